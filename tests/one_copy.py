"""Use a copy of the package that lacks extensions: `python one_copy.py FOLDER [all]`, in a process of its own.

The folder has data/ with images and masks. Printed is one line for each step.
"""

import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SMALL = (  # a run of a second
    *("data=folder", "data.classes=[dark,bright]", "data.root=data", "data.batch_size=2", "resolution.crop=[32,48]"),
    *("backbone=tiny", "backbone.patch_size=8", "backbone.arch.hidden_size=24", "backbone.arch.num_hidden_layers=2"),
    *("backbone.arch.num_attention_heads=3", "backbone.arch.intermediate_size=48", "adapter=full"),
)
FAST = ("engine=cpu", "engine.workers=0")


def run(*words: str) -> None:
    """Run a command line in this process; raise SystemExit if it fails."""
    from dinoseg import __main__

    sys.argv = ["dinoseg", *words]
    __main__.main()


def compose_all() -> int:
    """Compose each mode and dataset that is left; return their number."""
    from dinoseg.__main__ import CONFIGS
    from dinoseg.api.compose import compose
    from dinoseg.config.options import options_in

    modes, datasets = (options_in([Path(CONFIGS)], group) for group in ("mode", "data"))
    for mode in modes:
        check_targets(compose([f"mode={mode}"]))
    for dataset in datasets:
        check_targets(compose(["mode=eval", f"data={dataset}"]))
    return len(modes) + len(datasets)


def compose_recipes() -> int:
    """Compose each recipe that is left, for the first mode that reads its groups; return their number."""
    from dinoseg.__main__ import CONFIGS
    from dinoseg.api.compose import compose
    from dinoseg.config.options import options_in
    from dinoseg.utils.errors import UserError

    recipes = options_in([Path(CONFIGS)], "hparam")
    for recipe in recipes:
        with suppress(UserError):
            compose(["mode=train", f"hparam={recipe}", "data.root=data"])
            continue
        compose(["mode=eval", f"hparam={recipe}", "data.root=data"])
    return len(recipes)


def check_targets(cfg: Any) -> None:
    """Check that the modules of a config's targets exist, and that its choices are options."""
    from dinoseg.__main__ import CONFIGS
    from dinoseg.config.plain import to_container, walk

    for _, node in walk(to_container(cfg)):
        target = node.get("_target_", "") if isinstance(node, dict) else ""
        if target.startswith("dinoseg."):
            assert find_spec(target.rpartition(".")[0]), target
    for group, option in to_container(cfg)["choices"].items():
        names = [option] if isinstance(option, str) else option or []
        assert all((Path(CONFIGS, group.partition("@")[0]) / f"{name}.yaml").is_file() for name in names), group


def use_whole_core() -> None:
    """Train, resume, evaluate, predict, save and load, from the command line and from Python."""
    import numpy as np

    import dinoseg

    run("mode=train", *SMALL, *FAST, "trainer.steps=3", "resume=run", "hydra.run.dir=run")
    run("mode=eval", "resume=run", *FAST, "hydra.run.dir=scored")
    assert Path("scored/report.html").is_file() and Path("scored/scores.json").is_file()
    run("mode=predict", "resume=run", "input=data/val/images", *FAST, "hydra.run.dir=predicted")
    assert len([*Path("predicted/masks").glob("*.png")]) == 2
    model = dinoseg.load("run")
    model.save("model.safetensors")
    image = np.zeros((32, 48, 3), np.uint8)
    assert (dinoseg.load("model.safetensors").predict(image).mask == model.predict(image).mask).all()
    assert dinoseg.create_model("tiny", num_classes=2).num_classes == 2
    data = {"name": "folder", "root": "data", "classes": ["dark", "bright"], "batch_size": 2}
    trained = dinoseg.train(
        data=data, backbone="tiny", trainer={"steps": 1}, engine="cpu", resolution={"crop": [28, 28]}
    )
    assert dinoseg.evaluate(trained, engine="cpu")["miou"] >= 0


def main() -> None:
    """Check the copy on the command line."""
    import dinoseg

    folder = Path(sys.argv[1]).resolve()
    is_whole_core = "all" in sys.argv[2:]
    assert Path(dinoseg.__file__).is_relative_to(folder), dinoseg.__file__
    run("--help")
    print("composed", compose_all())
    run("mode=train", *SMALL, *FAST, "trainer.steps=2", "hydra.run.dir=run")
    if is_whole_core:
        print("composed", compose_recipes())
        use_whole_core()
    print("done")


if __name__ == "__main__":
    main()
