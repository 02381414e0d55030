"""Whose config files are the registry: the search path and the choices of the run that hydra started."""

from types import SimpleNamespace

from dinoseg.config import registry

LINEAR = "dinoseg.models.heads.linear.LinearHead"


def test_the_search_path_and_the_choices_of_a_run_are_read(tmp_path, monkeypatch):
    for name, target in (("head/mine", "my.Head"), ("parts/a", "my.Part")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.yaml").write_text(f"_target_: {target}\n")
    sources = [SimpleNamespace(schema="file", path=str(tmp_path)), SimpleNamespace(schema="structured", path="")]
    runtime = SimpleNamespace(config_sources=sources, choices={"parts@head.first": "a", "hparam": "base"})
    monkeypatch.setattr(registry.HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(registry.HydraConfig, "get", lambda: SimpleNamespace(runtime=runtime))
    found = registry.full_registry({"head": {"_target_": "my.Composed", "first": {"_target_": "my.Other"}}})
    assert found["head",].targets >= {"my.Head", "my.Composed", LINEAR}
    assert found["head", "first"].targets == {"my.Part", "my.Other"}
