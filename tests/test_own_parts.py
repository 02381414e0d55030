"""A head from a package and a config folder outside the repository."""

from command_line import SMALL, call, write_data

from dinoseg.modes.help import help_for

HEAD = """
from dinoseg.models.heads.linear import LinearHead

class MyHead(LinearHead):
    pass
"""
CONFIG = "defaults: [linear, _self_]\n_target_: my_parts.heads.MyHead\n"


def test_own_parts_are_listed_trained_and_evaluated(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "mine")
    for name, text in {
        "my_parts/__init__.py": "",
        "my_parts/heads.py": HEAD,
        "config/head/my_head.yaml": CONFIG,
    }.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    own = ("--config-dir", str(tmp_path / "mine/config"))
    assert " my_head " in help_for([*own, "--help"]) and " my_head " not in help_for(["--help"])
    write_data(tmp_path / "data")
    words = ("mode=train", *SMALL, "head=my_head", "hydra.run.dir=run", "mode.metrics_only=true")
    path = f"hydra.searchpath=[file://{tmp_path}/mine/config]"
    assert call(tmp_path, path, *words).status == 0
    evaluate = ("mode=eval", "resume=run", "engine=cpu", "engine.workers=0")
    refused = call(tmp_path, *evaluate)
    assert refused.status == 1 and "needs the --config-dir DIR (or hydra.searchpath) of its training" in refused.err
    assert call(tmp_path, *own, *evaluate).status == 0
