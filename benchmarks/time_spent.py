"""Where the processor's seconds of a command go, room by room: how it starts, trains, validates, evaluates and tracks.

    OMP_NUM_THREADS=1 python benchmarks/time_spent.py mode=train|eval|track KEY=VALUE ... [--skip 2]

The command runs as it is, in this process; the public doors between its rooms are watched. A second is one of the
processor's, spent in the thread that does the work (`time.thread_time`), so others on the machine shift the figures
little: give `engine.workers=0 data.workers=1`, so that reading is done in it, too. Each second counts once, in the
innermost room that it was spent in; the backward pass counts where the same part of the forward pass ran, by the nodes
that each part has left in the graph. Of training, the first steps (`--skip`) are left out: they start everything up.

Seconds are of an optimizer step, of an image (a clip) of a validation or an evaluation, of a frame, or of all of the
start and the end. With `engine.workers` above 0 the share of the time that a step waits for its batch is told as the
run's own meter has it, of the clock: it means something on a machine with nothing else to do.
"""

import argparse
import builtins
import dataclasses
import functools
import importlib
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

START, STEP, END, VALIDATION, EVALUATION, TRACK = "start", "training step", "end", "validation", "evaluation", "frame"
IMPORTS = "imports"
CLOSED = {"untrained outline", "tally", "log"}  # rooms within which only imports are told apart
PHASES = {  # the parts of a command, by the doors that lead there and back
    STEP: "training.trainer:fit",
    VALIDATION: "training.image_data_module:ImageDataModule.validate tasks.clips:ClipDataModule.validate "
    "report.log:RunLog.images training.checkpoint:Checkpoints.save_if_best",
    EVALUATION: "tasks.images:ImageTraining.evaluate tasks.clips:ClipTraining.evaluate modes.evaluate:evaluate_images",
    TRACK: "modes.track:track_video",
}
ROOMS = {  # by the doors, of functions and of generators, whose every item is a visit
    "launch, mode: rest": "launch:launch",
    "engine": "training.engine:Engine.__init__",
    "listing the data": "build:dataset build:clips",
    "untrained outline": "build:outline",
    "model and weights": "build:model build:backbone",
    "loss made": "build:loss",
    "optimizer made": "build:optimizer",
    "short doctor": "tasks.images:ImageTraining.check_data",
    "class counts": "data.scan.scan:class_counts",
    "reading, augmenting": "training.image_data_module:train_batches tasks.clips:clip_batches "
    "training.validation:eval_batches data.clips.cut:Clips.__getitem__",
    "to the device": "shapes:Batch.to shapes:ClipBatch.to",
    "bytes to floats": "model:SegmentationModel.pixels",
    "backward: rest": "training.engine:Engine.backward",
    "clip, optimizer": "training.engine:Engine.optimizer_step",
    "tally": "training.tally:Tally.add training.tally:Tally.read",
    "confusion matrix": "metrics.confusion:ConfusionMatrix.update",
    "log": "report.log:RunLog.scalars training.meter:Meter.step training.meter:Meter.read",
    "validation pictures": "report.log:RunLog.images training.image_data_module:compare",
    "saving": "training.checkpoint:Checkpoints.save training.checkpoint:Checkpoints.save_if_best "
    "training.checkpoint:Checkpoints.commit",
    "scores of segments": "tasks.clips:segment_scores tasks.clips:contingency",
    "collecting for the report": "evaluation.collected:Collector.add",
    "report": "tasks.images:report_images modes.evaluate:report_images",
    "pictures": "evaluation.images:compare evaluation.images:write_png",
    "decoding (thread)": "tracking.video.batches:VideoBatches.__iter__",
    "resizing": "tracking.propagation.features:resize",
    "propagation": "tracking.grid.propagator:Propagator.step",
    "labels to pixels": "tracking.propagation.masks:ObjectChannels.mask",
    "writing masks (thread)": "tracking.video.mask_folder:MaskFolder.write",
    "overlay and table": "modes.track:write_results",
}


class Clock:
    """Seconds of the processor by phase and room, of each thread in the innermost room that it is in."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.visits: Counter[tuple[str, str]] = Counter()
        self.units: Counter[str] = Counter({START: 1, END: 1})
        self.phase = START
        self.skip = 0  # training steps yet to be left out
        self.left_out = 0.0  # their seconds
        self._own = threading.local()

    def charge(self, room: str | None = None) -> None:
        """Charge the time since the last call to the innermost room, which from now on is called `room`."""
        own, now = self._own, time.thread_time()
        if not hasattr(own, "rooms"):
            # what the main thread has done so far is Python's own start; a later thread has done nothing
            own.rooms, own.since = ["rest"], 0.0
        self.seconds[self.phase, own.rooms[-1]] += now - own.since
        own.since, own.rooms[-1] = now, room or own.rooms[-1]

    def enter(self, room: str) -> None:
        self.charge()
        rooms = self._own.rooms
        rooms.append(rooms[-1] if rooms[-1] in CLOSED and room != IMPORTS else room)
        self.visits[self.phase, room] += rooms[-2] != room == rooms[-1]

    def leave(self) -> None:
        self.charge()
        self._own.rooms.pop()

    @contextmanager
    def room(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count a block as a phase of its own."""
        self.charge()
        before, self.phase = self.phase, phase
        with self.room("rest"):
            yield
        self.phase = END if phase in (STEP, TRACK) else before

    def forget(self, phase: str) -> None:
        self.charge()
        for key in [key for key in self.seconds if key[0] == phase]:
            self.left_out += self.seconds.pop(key)
            del self.visits[key]
        self.units[phase] = 0


clock = Clock()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", type=int, default=2, help="training steps that start everything up")
    args, words = parser.parse_known_args()
    clock.skip = args.skip
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        with clock.room(IMPORTS):
            import torch

            torch.set_num_threads(1)
            watch(stack)
        stack.enter_context(patch.object(sys, "argv", ["dinoseg", *words, f"hydra.run.dir={folder}"]))
        from dinoseg import __main__

        with clock.room("composing the config"):
            __main__.main()
        clock.charge()
        show(words, waited(folder))


def watch(stack: ExitStack) -> None:
    """Put the clock at each door until `stack` closes."""
    for rooms, inside in ((ROOMS, clock.room), (PHASES, clock.during)):
        for room, name in ((room, name) for room, names in rooms.items() for name in names.split()):
            module, _, path = name.partition(":")
            *above, last = path.split(".")
            owner = functools.reduce(getattr, above, importlib.import_module(f"dinoseg.{module}"))
            watched = door(getattr(owner, last), functools.partial(inside, room), AFTER.get(name))
            stack.enter_context(patch.object(owner, last, watched))
    for owner, last in ((builtins, "__import__"), (importlib, "import_module")):
        watched = door(getattr(owner, last), functools.partial(clock.room, IMPORTS))
        stack.enter_context(patch.object(owner, last, watched))


def door(
    call: Callable, inside: Callable[[], AbstractContextManager], after: Callable[[Any], None] | None = None
) -> Callable:
    """Return a function that is called inside of a room, as is `after` with its result, and each item it yields."""

    @functools.wraps(call)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with inside():
            result = call(*args, **kwargs)
            if after is not None:
                after(result)
        return items(result) if isinstance(result, Iterator) else result

    def items(result: Iterator) -> Iterator:
        while True:
            with inside():
                item = next(result, END)
            if item is END:
                return
            yield item

    return watched


def watch_model(model: Any) -> None:
    for name, room in (("run", "head"), ("predict", "upsampling")):
        after = functools.partial(mark, room)
        setattr(model.head, name, door(getattr(model.head, name), functools.partial(clock.room, room), after))
    watch_backbone(model.backbone)


def watch_backbone(backbone: Any) -> None:
    """Watch all modules of a backbone: a head may ask for some of them alone."""
    for module in backbone.modules():
        watch_module("backbone", module)


def watch_module(room: str, module: Any) -> None:
    def leave(_: Any, __: Any, result: Any) -> None:
        mark(room, result)
        clock.leave()

    module.register_forward_pre_hook(lambda *_: clock.enter(room))
    module.register_forward_hook(leave)


def mark(room: str, result: Any) -> None:
    """Let the nodes that a part of the forward pass has put in the graph say so when they run backward."""
    waiting = [tensor.grad_fn for tensor in tensors(result)]
    while waiting:
        node = waiting.pop()
        if node is not None and "room" not in node.metadata:
            node.metadata["room"] = room
            node.register_prehook(lambda _: clock.charge(f"backward: {room}"))
            waiting += [below for below, _ in node.next_functions]


def tensors(value: Any) -> Iterable[Any]:
    if hasattr(value, "grad_fn"):
        yield value
    elif dataclasses.is_dataclass(value):
        yield from tensors(list(vars(value).values()))
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def stepped(_: None) -> None:
    clock.units[STEP] += 1
    if clock.units[STEP] == clock.skip:
        clock.skip = 0
        clock.forget(STEP)


def scored(batch: Any) -> None:
    if clock.phase in (VALIDATION, EVALUATION):
        clock.units[clock.phase] += len(batch.names)


def tracked(passed: Any) -> None:
    clock.units[TRACK] += passed.items


AFTER: dict[str, Callable[[Any], None]] = {  # what is done with the results of doors
    "build:model": watch_model,
    "build:backbone": watch_backbone,
    "build:loss": functools.partial(watch_module, "loss"),
    "training.meter:Meter.step": stepped,
    "shapes:Batch.to": scored,
    "shapes:ClipBatch.to": scored,
    "modes.track:track_video": tracked,
}


def waited(folder: Path) -> list[float]:
    """Return the shares of the time that steps waited for their batch, but for the first log row."""
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [row["train/data_wait"] for row in rows if "train/data_wait" in row][1:]


def show(words: list[str], waits: list[float]) -> None:
    import tabulate
    import torch

    for phase in dict.fromkeys(phase for phase, _ in clock.seconds):
        units = max(1, clock.units[phase])
        rooms = {room: value / units for (at, room), value in clock.seconds.items() if at == phase}
        total = sum(rooms.values())
        rows = [
            (room, f"{value:.4f}", f"{value / total:.1%}", f"{clock.visits[phase, room] / units:.4g}")
            for room, value in sorted(rooms.items(), key=lambda item: -item[1])
            if value >= 0.0005 * total
        ]
        headers = [f"{phase} ({clock.units[phase]})", "seconds", "share", "visits"]
        print(tabulate.tabulate([*rows, ("all", f"{total:.4f}")], headers, disable_numparse=True), end="\n\n")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    outside = time.process_time() - sum(clock.seconds.values()) - clock.left_out
    print(f"python benchmarks/time_spent.py {' '.join(words)}")
    print(f"{platform.machine()}, torch {torch.__version__}, load {load}; {outside:.2f} s in threads without a room")
    if waits:
        print(f"waiting for data: {sum(waits) / len(waits):.1%} of the clock's time")


if __name__ == "__main__":
    main()
