"""A ``MemoryBank`` beside a dictionary of tensors that says what it must hold: any device, storage and policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bank_model import AtOnce, Compute

from longlive_rag_ops.bank import BankConfig, BankFull, MemoryBank, PageFormat

EMBEDDING = 6
SPOILED = 0x5D


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, as integers that compare: NaN equals itself."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


@dataclass
class HeldPages:
    """A frame that the bank must have: its stored bytes, its unit embedding per sample, how it is held."""

    record: torch.Tensor
    embedding: torch.Tensor | None
    generation: int
    fetched: int = 0  # pins by prefetch
    kept: int = 0  # pins against forgetting
    found: int = 0  # how often searches found it


class MemoryWorld:
    """A bank and what it must hold. Methods do one call each and check what can be seen of it."""

    def __init__(
        self,
        form: PageFormat,
        config: BankConfig,
        *,
        slots: int,
        sink: int = 0,
        per_commit: int = 3,
        device: str = "cpu",
        compute: Compute | None = None,
    ) -> None:
        self.form, self.config, self.device = form, config, device
        self.compute = compute or AtOnce()
        self.made: dict[str, Any] = {
            "device_slots": slots,
            "device": device,
            "sink": sink,
            "frames_per_commit": per_commit,
            "most_fetched": slots,
        }
        self.slots, self.sink, self.per_commit = slots, sink, per_commit
        self.bank = MemoryBank(form, config, **self.made)
        self.held: dict[int, HeldPages] = {}
        self.asked: dict[int, bool | None] = {}
        self.versions = 0
        self.forgotten = 0
        # Few directions, so that similarities tie.
        self.palette = torch.randn(4, EMBEDDING, generator=torch.Generator().manual_seed(4)).to(device)

    @property
    def kept_back(self) -> int:
        """Host records for frames on their way from disk or being replaced."""
        return min(max(self.slots, self.per_commit), self.config.disk_bytes // self.form.record_bytes)

    @property
    def most_frames(self) -> int:
        host, disk = self.config.host_bytes // self.form.record_bytes, self.config.disk_bytes // self.form.record_bytes
        return host + disk - self.kept_back

    # -- contents

    def pages(self, frames: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``(layers, samples, n, T, H, D)`` of new versions of frames, random."""
        self.versions += 1
        form = self.form
        noise = torch.Generator().manual_seed(self.versions * 1000 + sum(frames))
        shape = (2, form.layers, form.samples, len(frames), *form.page_shape)
        both = torch.randn(shape, generator=noise).to(form.dtype).to(self.device)
        return both[0], both[1]

    def embeddings(self, picks: Sequence[int]) -> torch.Tensor:
        """``(samples, n, E)``, from the palette; the samples choose differently."""
        rows = [
            [self.palette[(pick + sample * (pick // 4)) % 4] for pick in picks] for sample in range(self.form.samples)
        ]
        return torch.stack([torch.stack(row) for row in rows])

    def expected_forgotten(self, wanted: int) -> Iterator[set[int]]:
        """The frames that a policy may choose next, one set for each frame that has to go."""
        left = dict(self.held)
        for _ in range(wanted):
            free = [f for f, h in left.items() if f >= self.sink and not h.fetched and not h.kept]
            if not free or self.config.policy == "error":
                return
            if self.config.policy == "oldest":
                allowed = {min(free)}
            elif self.config.policy == "least_retrieved":
                allowed = {min(free, key=lambda frame: (left[frame].found, frame))}
            else:
                redundancy = {frame: self._redundancy(frame, left) for frame in free}
                most = max(redundancy.values())
                allowed = {frame for frame, value in redundancy.items() if value >= most - 1e-5}
            chosen = yield allowed
            left.pop(chosen)

    def _redundancy(self, frame: int, among: dict[int, HeldPages]) -> float:
        mine = among[frame].embedding
        if mine is None:
            return float("inf")
        others = [h.embedding for f, h in among.items() if f != frame and h.embedding is not None]
        if not others:
            return -float("inf")
        return float(torch.stack([(mine * other).sum(-1) for other in others]).amax(0).min())

    # -- calls

    def commit(
        self,
        frames: Sequence[int],
        picks: Sequence[int] | None,
        *,
        replace: bool = False,
        stream: int = 0,
        spoil_on: int | None = None,
        stacked: bool = False,
    ) -> bool:
        """Writes pages on the stream, commits, and overwrites them as soon as that is allowed. False: BankFull."""
        values = self.pages(frames)
        keys, vals = (torch.full_like(half, float("nan")) for half in values)
        for memory, value in zip((keys, vals), values, strict=True):
            self.compute.write(stream, bits(memory), bits(value))
        given = None if picks is None else self.embeddings(picks)
        missing = max(0, len(frames) - self.bank.room()) if not replace else 0
        plan = self.expected_forgotten(missing)
        arguments = (keys, vals) if stacked else ([*keys.unbind(2)], [*vals.unbind(2)])
        with self.on(stream):
            try:
                gone = list(self.bank.commit(list(frames), *arguments, given, replace=replace))
            except BankFull:
                assert not replace, frames  # a full bank takes new generations of any frames
                assert missing and len(list(self._take(plan))) < missing
                return False
        assert len(gone) == missing, (gone, missing)
        for frame, allowed in zip(gone, self._take(plan, gone), strict=True):
            assert frame in allowed, (gone, allowed, self.config.policy)
            del self.held[frame]
            self.asked.pop(frame, None)
        self.forgotten += len(gone)
        for number, frame in enumerate(frames):
            record = self.form.encode(values[0][:, :, number], values[1][:, :, number]).cpu()
            unit = None if given is None else torch.nn.functional.normalize(given[:, number], dim=-1).cpu()
            old = self.held.get(frame)
            new = HeldPages(record, unit, self.bank.generation(frame))
            if old is not None:
                assert new.generation > old.generation
                new.found, new.kept = old.found, old.kept
                if unit is None:
                    new.embedding = old.embedding
                if frame in self.asked:
                    self.asked[frame] = False if old.fetched else None
            self.held[frame] = new
        other = stream if spoil_on is None else spoil_on
        for layer in range(self.form.layers):
            self.wait(layer, other)
            for memory in (keys, vals):
                part = bits(memory[layer])
                self.compute.write(other, part, torch.full_like(part, SPOILED))
        return True

    @staticmethod
    def _take(plan: Any, chosen: Sequence[int] = ()) -> Iterator[set[int]]:
        """Steps of a plan, told what was chosen; without that, what it would have chosen."""
        try:
            allowed = next(plan)
            for number in range(len(chosen) or 1000):
                yield allowed
                allowed = plan.send(chosen[number] if chosen else min(allowed))
        except StopIteration:
            return

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """Makes a stream the current one, where there are streams."""
        if self.device == "cuda":
            with torch.cuda.stream(torch.cuda.ExternalStream(stream) if stream else torch.cuda.default_stream()):
                yield
        else:
            yield

    def prefetch(self, frames: Sequence[int], stream: int = 0) -> bool:
        pinned = {f for f, h in self.held.items() if h.fetched} | {f for f in frames if f in self.held}
        with self.on(stream):
            try:
                self.bank.prefetch(list(frames))
            except BankFull:
                assert len(pinned) > self.slots, (frames, pinned)
                return False
        assert len(pinned) <= self.slots
        for frame in frames:
            self.asked[frame] = frame in self.held
            if frame in self.held:
                self.held[frame].fetched += 1
        return True

    def settle(self, stream: int = 0) -> None:
        with self.on(stream):
            lost = {each.frame: each.reason for each in self.bank.settle()}
        assert {frame for frame, there in self.asked.items() if there is False} <= set(lost), (lost, self.asked)
        assert not any(self.asked.get(frame) for frame in lost), (lost, self.asked)
        self.asked.clear()

    def wait(self, layer: int, stream: int = 0) -> None:
        with self.on(stream):
            self.bank.wait(layer)
        # It settles: what could not be had is kept for the next call of settle.
        self.asked = {frame: there for frame, there in self.asked.items() if not there}

    def attend(self, stream: int = 0, release: bool = True) -> None:
        """Reads the slots of all frames that were fetched, layer by layer, then lets them go."""
        frames = [frame for frame, held in self.held.items() if held.fetched]
        for layer in range(self.form.layers):
            self.wait(layer, stream)
            for frame in frames:
                self._look(frame, layer, stream)
        if release and frames:
            self.release(frames, stream)

    def _look(self, frame: int, layer: int, stream: int) -> None:
        slot = self.bank.slot(frame)
        assert 0 <= slot < self.slots, (frame, slot)
        record, form = self.held[frame].record[layer], self.form
        if form.quantised:
            wanted = [(self.bank.slots[layer, :, slot], record)]
        else:
            each = form.data_bytes
            halves = [record[:, i * each : (i + 1) * each].clone() for i in range(2)]
            wanted = [(bits(self.bank.slots[layer, i, :, slot]), half) for i, half in enumerate(halves)]
        for values, want in wanted:

            def check(got: Any, want: torch.Tensor = want, about: str = f"frame {frame}, slot {slot}") -> None:
                same = torch.equal(torch.as_tensor(got).cpu().contiguous().view(torch.uint8).flatten(), want.flatten())
                assert same, f"{about}, layer {layer}: other bytes"

            self.compute.read(stream, values, check)

    def release(self, frames: Sequence[int], stream: int = 0) -> None:
        with self.on(stream):
            self.bank.release(list(frames))
        for frame in frames:
            if frame in self.held and self.held[frame].fetched:
                self.held[frame].fetched -= 1

    def forget(self, frames: Sequence[int]) -> bool:
        wrong = any(f not in self.held or self.held[f].fetched or self.held[f].kept for f in frames)
        try:
            self.bank.forget(list(frames))
        except ValueError as error:
            assert wrong, error
            return False
        assert not wrong, frames
        for frame in frames:
            del self.held[frame]
            self.asked.pop(frame, None)
        return True

    def pin(self, frame: int) -> None:
        if frame in self.held:
            self.bank.pin([frame])
            self.held[frame].kept += 1

    def unpin(self, frame: int) -> None:
        if frame in self.held and self.held[frame].kept:
            self.bank.unpin([frame])
            self.held[frame].kept -= 1

    def search(self, pick: int, k: int, end_frame: int) -> list[int]:
        """What retrieval finds: the most similar frames from sink to ``end_frame``, ties to the older."""
        query = self.embeddings([pick])[:, 0]
        ids, _ = self.bank.search(query, k, end_frame=end_frame)
        for sample in range(self.form.samples):
            unit = torch.nn.functional.normalize(query[sample].cpu(), dim=-1)
            scores = {
                f: float((h.embedding[sample] * unit).sum())
                for f, h in self.held.items()
                if h.embedding is not None and self.sink <= f < end_frame
            }
            got = [frame for frame in ids[sample].tolist() if frame >= 0]
            assert len(got) == min(k, len(scores)) and set(got) <= set(scores), (got, scores)
            rest = [scores[f] for f in scores if f not in got]
            assert not got or not rest or min(scores[f] for f in got) >= max(rest) - 1e-5
            for one, next_one in pairwise(got):
                assert scores[one] > scores[next_one] - 1e-5
                assert scores[one] > scores[next_one] + 1e-5 or one < next_one  # equal rows score equal
            for frame in got:
                self.held[frame].found += 1
        return sorted({f for f in ids.flatten().tolist() if f >= 0})

    def reopen(self, folder: Path) -> None:
        """Saves the bank, closes it, and goes on with what was saved. Pins are of a process, not of a bank."""
        self.compute.finish()
        self.bank.save(folder)
        self.bank.close()
        self.bank = MemoryBank.open(folder, self.config, **self.made)
        self.asked.clear()
        for held in self.held.values():
            held.fetched = held.kept = 0

    # -- what holds at any time

    def check(self) -> None:
        """Pages and index agree with each other and with the model."""
        bank = self.bank
        assert list(bank.frames()) == sorted(self.held) and len(bank) == len(self.held)
        assert bank.room() == self.most_frames - len(self.held) >= 0
        for frame, held in self.held.items():
            assert frame in bank and bank.generation(frame) == held.generation
        searchable = sorted(frame for frame, held in self.held.items() if held.embedding is not None)
        assert bank.index is None or bank.index.frames() == searchable
        assert bank.index is not None or not searchable

    def finish(self) -> None:
        self.compute.finish()
        self.check()
        for frame, held in self.held.items():
            got = self.bank.record(frame)
            assert torch.equal(got, held.record), f"frame {frame}: another record"
        self.bank.close()
