"""Embedders judged without a generator, on clips of latent frames.

``longlive-rag eval-embedder`` is `evaluate` with files around it. This is not part of ``embedder``, because it needs
the demo's toy transformer and codec, which embedders do not.

====================== ==================================================================================
``clip``               a clip, from a latent file or a video
``named_embedder``     an embedder with a name, its embeddings checked
``names``              what names may be
``similarity``         cosines of neighbours and of all pairs
``choice``             which frames a block may retrieve, and does
``full_attention``     how much a toy's attention over the whole history weighs each frame
``overlap``            chosen frames against those
``returning_scene``    edits A, B, A and the recall of A
``evaluate``           all of it
``report``             ``evaluation.json``
``table``              tables as text and Markdown
``plots``              the pictures
``drawing``            what they share
``curves``             pictures of cosines
``bars``               pictures of overlap and recall
``similarity_sheet``   a picture of an edit's similarity matrices
``run``                files read, evaluated and written
====================== ==================================================================================
"""
