"""The loop of a training: model, optimizer and data of a run, step by step."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..version import __version__
from .autoencoder import LatentAutoencoder
from .checkpoint import save_autoencoder
from .clip_dataset import Batch, ClipDataset, EpochBatches, as_it_is, leave_signals
from .latent_file import LatentFile
from .losses import RetrievalLoss, RetrievalTerms
from .run_folder import RunFolder
from .stop_signal import StopSignal
from .training_config import TrainingConfig
from .training_log import TrainingLog
from .training_optimizer import check_scaler, optimizer_state
from .training_progress import Progress
from .training_state import DataIdentity, SavedTraining, write_training

SAVE_SECONDS = 60.0  # between two writings of last.pt, which has three times the model's size
LOADER_SECONDS = 300.0  # for a batch from another process, before it is taken for lost


class TrainingLoop:
    """Model, optimizer and data of a run, and the loop over them.

    Args:
        config: hyper-parameters, the sizes of a frame among them.
        clips: to train with and to validate.
        data: what is remembered of them.
        folder: of the run.
        device: to train on.
        command: that starts this training, to be kept with the models.

    Attributes:
        progress: how far it has come.
    """

    def __init__(
        self,
        config: TrainingConfig,
        clips: list[LatentFile],
        data: DataIdentity,
        folder: RunFolder,
        device: torch.device,
        command: str,
    ) -> None:
        self.config, self.folder, self.device, self.command, self.data = config, folder, device, command, data
        self.batches = EpochBatches(clips, config)
        self.loader = DataLoader(
            ClipDataset(clips, config.seq_len),
            batch_sampler=self.batches,
            num_workers=config.num_workers,
            collate_fn=as_it_is,
            pin_memory=device.type == "cuda",
            worker_init_fn=leave_signals,
            timeout=LOADER_SECONDS if config.num_workers else 0,
            persistent_workers=config.num_workers > 0,
            generator=torch.Generator(),  # torch's own would be advanced, which is the caller's
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = LatentAutoencoder(config.autoencoder)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss = RetrievalLoss(
            window=config.delta_window,
            margin=config.delta_margin,
            delta_weight=config.delta_weight,
            smooth_weight=config.smooth_weight,
            smooth_form=config.smooth_form,
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        # Float16, as released, though bfloat16 needs no scaler: the smoothness is a second difference of embeddings, of
        # which little is left but their rounding, and bfloat16 rounds eight times as coarsely.
        self.half = config.use_amp and device.type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.half)
        self.progress = Progress()
        self._best: dict[str, torch.Tensor] | None = None  # weights that best.safetensors does not have yet
        self._saved_at = 0.0

    def start(self, saved: SavedTraining | None) -> None:
        """Takes over a saved state, if there is one, and brings the folder, which is held, up to it."""
        if saved is not None:
            self._restore(saved)
        self.folder.remove_partial()
        self._saved_at = time.monotonic()
        if saved is None:
            self._save()  # first: a run that is cut off here can be resumed
        self.folder.write_config(self._description())
        self.folder.write_metrics(self.progress.history)

    def run(self, stop: StopSignal, log: TrainingLog) -> None:
        """Epochs until there are enough, or somebody or ``patience`` says so.

        Raises:
            OSError: a file cannot be written; the state is saved, if that can be. Others: see `train`.
        """
        try:
            self._epochs(stop, log)
        except OSError:  # of files alone, so between two steps
            self._save()
            raise
        self._save()

    def _epochs(self, stop: StopSignal, log: TrainingLog) -> None:
        progress = self.progress
        log.print(self._summary())
        while progress.epoch < self.config.epochs and not self.out_of_patience and stop.received is None:
            if not self._epoch(stop, log):
                break
            line = progress.history[-1]
            log.epoch(line, progress.best_epoch == progress.epoch)
            self.folder.write_metrics(progress.history)
            if self.config.save_every and progress.epoch % self.config.save_every == 0:
                save_autoencoder(self.folder.epoch(progress.epoch), self.model, self._metadata(line))
            if time.monotonic() - self._saved_at >= SAVE_SECONDS:
                self._save()

    @property
    def out_of_patience(self) -> bool:
        """Whether there have been ``patience`` epochs without a better one."""
        return bool(self.config.patience) and self.progress.since_best >= self.config.patience

    def _epoch(self, stop: StopSignal, log: TrainingLog) -> bool:
        """What is left of an epoch; False when it was stopped before its end."""
        progress, batches = self.progress, self.batches
        begun = time.monotonic() - progress.seconds
        batches.begin(progress.epoch, progress.step)
        loaded = iter(self.loader)
        bar = log.bar(progress.epoch + 1, batches.steps + len(batches.validation), progress.step)
        try:
            for batch in batches.training[progress.step :]:
                losses = self._step(next(loaded), batch)
                progress.sums = [a + b * len(batch) for a, b in zip(progress.sums, losses, strict=True)]
                progress.chunks += len(batch)
                progress.step += 1
                progress.seconds = time.monotonic() - begun
                total, *terms = map("{:.4g}".format, losses)
                bar.update(f"loss {total} = {' + '.join(terms)}")
                if stop.received is not None:
                    return False
                if time.monotonic() - self._saved_at >= SAVE_SECONDS:
                    self._save()
            sums, chunks = [0.0] * len(progress.sums), 0
            for batch in batches.validation:
                losses = self._validate(next(loaded), batch)
                sums = [a + b * len(batch) for a, b in zip(sums, losses, strict=True)]
                chunks += len(batch)
                bar.update()
                if stop.received is not None:  # weights do not change here: all of it is computed again
                    return False
        finally:
            bar.close()
        self._finish([a / progress.chunks for a in progress.sums], [a / chunks for a in sums], time.monotonic() - begun)
        return True

    def _finish(self, training: list[float], validation: list[float], seconds: float) -> None:
        """Books an epoch."""
        progress, names = self.progress, RetrievalTerms._fields
        progress.history.append(
            {
                "epoch": progress.epoch + 1,
                "train": dict(zip(names, training, strict=True)),
                "validation": dict(zip(names, validation, strict=True)),
                "seconds": seconds,
            }
        )
        progress.epoch, progress.step, progress.chunks, progress.seconds = progress.epoch + 1, 0, 0, 0.0
        progress.sums = [0.0] * len(names)
        if not progress.best_epoch or validation[0] < progress.best_loss:
            progress.best_epoch, progress.best_loss = progress.epoch, validation[0]
            self._best = {name: value.clone() for name, value in self.model.state_dict().items()}

    def _step(self, clips: torch.Tensor | Exception, batch: Batch) -> list[float]:
        """One step of the optimizer; the losses before it."""
        terms, losses = self._losses(clips, batch, f"step {self.progress.step + 1}")
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(terms.total).backward()
        if self.config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses

    @torch.no_grad()
    def _validate(self, clips: torch.Tensor | Exception, batch: Batch) -> list[float]:
        return self._losses(clips, batch, "validation")[1]

    def _losses(self, clips: torch.Tensor | Exception, batch: Batch, where: str) -> tuple[RetrievalTerms, list[float]]:
        """Losses of a batch ``(chunks, T, C, H, W)``, as tensors and as numbers."""
        if isinstance(clips, Exception):
            raise clips
        clips = clips.to(self.device, non_blocking=True)
        shape = clips.shape[:2]
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            reconstruction, embeddings = self.model(clips.flatten(0, 1).to(memory_format=torch.channels_last))
            terms = self.loss(reconstruction.unflatten(0, shape), clips, embeddings.unflatten(0, shape))
        losses = torch.stack(terms).detach().tolist()
        if not all(map(math.isfinite, losses)):
            found = ", ".join(f"{name} {value}" for name, value in zip(RetrievalTerms._fields, losses, strict=True))
            raise RuntimeError(
                f"the loss is not finite in epoch {self.progress.epoch + 1}, {where}: {found}; the batch is of "
                f"{self.batches.names(batch)}; {self.folder.last} is as it was last written"
                + ("; float16 may be too narrow, see use_amp" if self.half else "")
            )
        return terms, losses

    def _save(self) -> None:
        """Writes best.safetensors, if it is another, then last.pt, which so never speaks of one that is not there."""
        if self._best is not None:
            with torch.device("meta"):
                model = LatentAutoencoder(self.model.config)
            model.load_state_dict(self._best, assign=True)
            line = self.progress.history[self.progress.best_epoch - 1]
            save_autoencoder(self.folder.best, model, self._metadata(line))
        states = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
        write_training(self.folder.last, self.config, self.data, self.progress, states)
        self._best, self._saved_at = None, time.monotonic()

    def _restore(self, saved: SavedTraining) -> None:
        step, chunks = saved.progress.step, saved.progress.chunks
        try:
            if (step, chunks) != (min(step, self.batches.steps), self.batches.chunks(step)):
                raise ValueError(f"an epoch has {self.batches.steps} steps, got step {step} after {chunks} chunks")
            self.model.load_state_dict(saved.states["model"])
            self.optimizer.load_state_dict(optimizer_state(saved.states["optimizer"], self.model, self.optimizer))
            check_scaler(saved.states["scaler"], self.scaler.state_dict())
            if saved.states["scaler"]:  # empty where it was saved without float16
                self.scaler.load_state_dict(dict(saved.states["scaler"]))
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            first = " ".join(str(error).split())[:200]
            raise ValueError(f"training state {saved.path} does not fit its own configuration: {first}") from None
        self.progress = saved.progress

    def _metadata(self, line: dict[str, Any]) -> dict[str, str]:
        """What an exported model says of its training: no path but the folders' names."""
        return {
            "version": __version__,
            "command": self.command,
            "training": json.dumps(self.config.to_mapping()),
            "epoch": str(line["epoch"]),
            "validation": json.dumps(line["validation"]),
        }

    def _description(self) -> dict[str, Any]:
        names = [clip.name for clip in self.data.clips]
        return {
            "version": __version__,
            "torch": torch.__version__,
            "command": self.command,
            "config": self.config.to_mapping(),
            "data": {
                "clips": len(names),
                "frames": sum(clip.frames for clip in self.data.clips),
                "validation_clips": [names[number] for number in self.batches.validation_clips],
            },
        }

    def _summary(self) -> str:
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"{len(self.batches.train_clips)} clips to train with, {len(self.batches.validation_clips)} to validate, "
            f"frames {' x '.join(map(str, self.data.frame_shape))}; {weights / 1e6:.2f} M weights, "
            f"{'float16' if self.half else 'float32'} on {self.device}; {self.batches.steps} steps an epoch, epoch "
            f"{self.progress.epoch + 1}, step {self.progress.step + 1} next"
        )
