"""Options of config groups and the files that set their keys."""

from pathlib import Path

from dinoseg.config.options import option_files, values_in_files
from dinoseg.modes.help import CONFIGS


def test_an_option_overrides_the_files_of_its_defaults_list():
    assert values_in_files(CONFIGS, "slots", "trainer.steps") == [20000, 5000]
    names = [path.stem for path in option_files([CONFIGS], "trainer", "slots")]
    assert names[-1] == "slots" and "supervised" in names


def test_recipes_start_from_others_by_their_whole_path():
    files = [*option_files([CONFIGS], "hparam", "sarrarp_lora_lowres")]
    assert [path.relative_to(CONFIGS).as_posix() for path in files[-2:]] == [
        "hparam/sarrarp_lora.yaml",
        "hparam/sarrarp_lora_lowres.yaml",
    ]


def test_an_option_without_a_file_has_no_values(tmp_path):
    assert values_in_files(CONFIGS, "missing", "head.lr") == [] and [*option_files([Path(tmp_path)], "head", "x")] == []
