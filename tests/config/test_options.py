"""Options of config groups and the files that set their keys."""

from dinoseg.config.options import option_files
from dinoseg.modes.help import CONFIGS


def test_files_of_a_defaults_list_come_before_the_option():
    names = [path.stem for path in option_files([CONFIGS], "trainer", "slots")]
    assert names[-1] == "slots" and "supervised" in names


def test_recipes_start_from_others_by_their_whole_path():
    files = [*option_files([CONFIGS], "hparam", "sarrarp_lora_lowres")]
    assert [path.relative_to(CONFIGS).as_posix() for path in files[-2:]] == [
        "hparam/sarrarp_lora.yaml",
        "hparam/sarrarp_lora_lowres.yaml",
    ]


def test_an_option_without_a_file_has_no_files(tmp_path):
    assert [*option_files([tmp_path], "head", "x")] == []
