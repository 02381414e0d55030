"""A checkpoint stores names of options and plain values: whatever else its config holds is refused in one message."""

import copy
import json
import sys
from functools import partial

import pytest
from config_files import FOLDER
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from mistakes import assert_refused
from omegaconf import OmegaConf

from dinoseg.config.composition import compose_options
from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import to_container
from dinoseg.config.resolvers import register_resolvers
from dinoseg.config.stored import Source, compose_stored, describe, description_of
from dinoseg.training.description import SAVED
from dinoseg.utils.errors import UserError

LINEAR = "dinoseg.models.heads.linear.LinearHead"
CHOICES = {
    **{"backbone": "dinov2_vits14", "adapter": "lora", "head": "linear", "loss": "ce_dice", "data": "folder"},
    **{"optim": "adamw", "trainer": "supervised", "inference": "auto", "data/augment/color": "jitter"},
    "data/pixels": "one_file",
}
KEYS = [key for key in SAVED if key in CHOICES or key in ("seed", "resolution")]
SHELL = [  # names that reach, or seem to reach, any callable
    *"""
    torch.nn.modules.module._WrappedHook.__call__ torch.nn.modules.module._WrappedHook
    torch.nn.utils._deprecation_utils.lazy_deprecated_import torch.nn.Sequential torch.nn.Linear
    torch.nn.Module.apply torch.nn.functional.os.system torch.nn.parallel.data_parallel.DataParallel
    torch.nn.utils.stateless.functional_call torch.nn.modules.lazy.LazyModuleMixin torch.optim.SGD
    torch.optim.optimizer.torch.load torch.load torch.hub.load torch.serialization.load torch.package.PackageImporter
    torch.jit.load torch.distributed.launch.main torch.multiprocessing.spawn.spawn
    torch.utils.cpp_extension.load_inline torch.utils._config_module.install_config_module
    torch._inductor.codecache.PyCodeCache.load torch._dynamo.config_utils.exec numpy.testing._private.utils.runstring
    numpy.testing.rundocs numpy.load numpy.f2py.main setuptools.sandbox.run_setup setuptools._distutils.spawn.spawn
    shutil.rmtree shutil.move os.system posix.system builtins.eval builtins.exec eval subprocess.Popen pty.spawn
    timeit.timeit cProfile.run code.interact runpy.run_path webbrowser.open pickle.loads importlib.import_module
    functools.partial functools.reduce operator.methodcaller ctypes.CDLL hydra.utils.instantiate hydra.utils.call
    hydra.utils.get_method hydra._internal.utils._locate hydra._internal.instantiate._instantiate2.instantiate
    omegaconf.OmegaConf.register_new_resolver omegaconf.OmegaConf.load pydoc.locate peft.PeftModel.from_pretrained
    transformers.pipeline transformers.AutoModel.from_pretrained timm.create_model
    accelerate.launchers.notebook_launcher matplotlib.backends.backend_pgf.LatexManager yaml.unsafe_load
    dinoseg.config.nodes.instantiate dinoseg.config.nodes.hydra_instantiate
    dinoseg.experiment.builder.importlib.import_module dinoseg.models.model.torch.hub.load dinoseg.cli.launch.launch
    dinoseg.extensions.rendering.render_mode.render dinoseg.extensions.export.export_mode.export
    dinoseg.training.checkpoint.write
    dinoseg.extensions.prepare.sarrarp.prepare dinoseg.extensions.prepare.idd.prepare
    dinoseg.extensions.rendering.surgery.write.render_dataset dinoseg.extensions.prepare.sarrarp.shutil.rmtree
    dinoseg.extensions.packed.pack.pack dinoseg.utils.locks.hold_lock dinoseg.extensions.packed.store.write_index
    dinoseg.data.scan.scan.scan dinoseg.data.checks.errors.check_for_errors dinoseg.extensions.video.index.index_videos
    dinoseg.models.heads.linear dinoseg.models.heads.linear.LinearHead.forward.__globals__
    dinoseg.models.heads.linear.LinearHead.__init__.__globals__ dinoseg.models.heads.linear.LinearHead.__class__
    dinoseg.models.heads.linear.nn.Linear dinoseg.models.heads..linear.LinearHead
    ..dinoseg.models.heads.linear.LinearHead
    """.split(),
    *(" dinoseg.models.heads.linear.LinearHead", "dinoseg.models.heads.linear.LinearHead "),
    "dinoseg.models.heads.linear.LinearHead\n",
    "dinoseg.models.heads.linear.LinearHe\u0430d",  # a Cyrillic a
    "dinoseg.models.heads.linear.\uff2cinearHead",  # a wide L, which Python reads as an L
    *("\x1b[2J", "", "???", "${data.root}", "${head._target_}"),
]
register_resolvers()


def compose_job(choices=CHOICES, folders=(), **changes):
    """Return a job's config of these options, with values at dotted keys."""
    cfg = compose_options({"engine": "auto", **choices}, folders)
    cfg = OmegaConf.merge(cfg, {"choices": choices, "config_dirs": list(folders), "data": {"root": "."}})
    cfg.data.classes, cfg.data.palette, cfg.data.background = ["dark", "bright"], None, None
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def as_read(description):
    """Return a description as a file gives it back."""
    return json.loads(json.dumps(description))


@pytest.fixture(scope="module")
def sound():
    """Return the description of a run as its checkpoint holds it."""
    return as_read(describe(compose_job(), KEYS))


def plant_value(sound, place, value):
    """Return a description whose config has a value at a place."""
    description = copy.deepcopy(sound)
    node, (*above, last) = description["config"], place.split("/")
    for key in above:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    node[last] = value
    return description


def load(description, **options):
    return compose_stored(description, Source("resume=file", **options))


def choose(sound, group, option):
    return {**sound, "choices": {**sound["choices"], group: option}}


def by_hydra(folder, *words):
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        return hydra_compose("main", [*words, f"hydra.searchpath=[file://{folder}]"])


def test_a_stored_config_is_the_config_of_the_run(sound):
    cfg = compose_job(**{"head.layers": [-2], "adapter.rank": 4, "data.reader.masks.ids": {3: 255}})
    expected = as_read(OmegaConf.to_container(cfg, resolve=True))
    description = as_read(describe(cfg, KEYS))
    for stored in (description, as_read(describe(OmegaConf.merge(cfg, load(description)), KEYS))):
        found = OmegaConf.merge(cfg, load(stored))
        assert as_read(OmegaConf.to_container(found, resolve=True)) == expected
    text = json.dumps(description["config"])
    assert "_target_" not in text and "${" not in text and "cache_dir" not in text
    assert description["targets"]["head"] == LINEAR
    assert "num_classes" not in description["config"]["head"] and description["config"]["adapter"]["rank"] == 4


@pytest.mark.parametrize(
    ("trainer", "brought"),
    [("supervised", set()), ("distil", {"teacher"}), ("slots", set())],
)
def test_options_bring_root_keys_of_their_own_but_no_groups(trainer, brought, caplog):
    stored = as_read(describe(compose_job({**CHOICES, "trainer": trainer}), KEYS))
    assert load(stored).keys() == {*KEYS} | brought and not caplog.messages


def test_interpolations_of_options_follow_the_command_line(sound):
    found = load(sound)
    assert found["inference"]["size"] == "${resolution.crop}"
    typed = as_read(describe(compose_job(**{"inference.size": "${resolution.longest}"}), KEYS))
    assert typed["config"]["inference"]["size"] is None


def test_values_stay_when_a_config_file_changes(tmp_path, caplog):
    (tmp_path / "head").mkdir()
    file = tmp_path / "head/mine.yaml"
    text = f"{{_target_: {LINEAR}, _partial_: true, layers: [-1], lr: 0.1, num_classes: 2, dropout: 0.5}}"
    file.write_text(text)
    choices = {**CHOICES, "head": "mine"}
    stored = as_read(describe(compose_job(choices, [str(tmp_path)]), KEYS))
    file.write_text(text.replace("0.5", "0.25, init: normal"))
    found = load(stored, folders=[tmp_path])
    assert found["head"]["dropout"] == 0.5 and found["head"]["init"] == "normal"
    assert "it has no value of head.init" in caplog.text
    file.write_text(text.replace(", dropout: 0.5", ""))
    assert load(stored, folders=[tmp_path])["head"]["dropout"] == 0.5  # still an argument of the class
    file.write_text(text.replace(LINEAR, "my.Head"))
    with pytest.raises(UserError, match=f"its head is {LINEAR}, and config files on this machine name my.Head there"):
        load(stored, folders=[tmp_path])


def test_component_that_the_options_here_lack_is_refused(sound):
    stored = {**sound, "targets": {**sound["targets"], "head.norm": "my.Norm"}}
    assert_refused(lambda: load(stored), "its head.norm is my.Norm, and config files ", " name no class there")


NO_NAMES = ("../head/mlp", "/etc/x", "a/../../b", "", "a b", "${seed}", 3, None, ["mlp"])


def test_missing_options_are_named(sound):
    message = "head=mine is not an option on this machine"
    assert_refused(lambda: load(choose(sound, "head", "mine")), "resume=file: ", message, " --config-dir FOLDER")


@pytest.mark.parametrize(
    ("group", "option"),
    [
        *(("head", option) for option in NO_NAMES),
        *((group, "idd") for group in ("protocol@data.a b", "a/../b@data", "protocol@data.${seed}")),
    ],
)
def test_names_of_options_do_not_leave_the_groups(sound, group, option):
    assert_refused(lambda: load(choose(sound, group, option)), "resume=file: ", "is not the name of an option")


def test_options_of_nested_groups_are_stored():
    choices = {**CHOICES, "data": "sarrarp", "data/augment/color": "photometric", "protocol@data.official": "idd"}
    stored = as_read(describe(compose_job(choices), KEYS))
    assert stored["choices"] == choices
    found = load(stored)
    assert found["data"]["official"]["_target_"].endswith("Idd")
    assert found["data"]["augment"]["color"]["_target_"].endswith("PhotometricDistortion")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss.criterion.terms.x", {"_target_": "dinoseg.losses.overlap.Dice"}),
        ("head._target_", "dinoseg.models.heads.mlp.MlpHead"),
        ("head._convert_", "all"),
        ("data.augment.color", {"_target_": "dinoseg.data.photometric.PhotometricDistortion"}),
        ("data.reader.masks.ids", [{"_target_": LINEAR}]),
    ],
)
def test_component_outside_the_options_is_refused(key, value):
    with pytest.raises(UserError, match="is a component that no option of a config group names.*Make it an option"):
        describe(compose_job(**{key: value}), KEYS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer.more": 1}, "trainer.more is not a key of the chosen options"),
        ({"data.classes": ["a", "\\${b}"]}, "data.classes.1=${b} is refused"),
    ],
)
def test_config_that_cannot_be_stored_is_refused(changes, message):
    assert_refused(lambda: describe(compose_job(**changes), KEYS), message)


def test_a_removed_key_cannot_be_stored():
    cfg = compose_job()
    del cfg.data.augment.affine
    assert_refused(lambda: describe(cfg, KEYS), "~data.augment.affine removes a key")


def test_components_can_be_unset(sound):
    stored = as_read(describe(compose_job(**{"data.augment.affine": None}), KEYS))
    assert load(stored)["data"]["augment"]["affine"] is None
    assert load(plant_value(sound, "data/reader", None))["data"]["reader"] is None


@pytest.mark.parametrize("target", SHELL, ids=ascii)
def test_a_target_is_refused_anywhere(sound, target):
    before = set(sys.modules)
    for place in ("head", "loss/criterion", "loss/criterion/terms/ce", "data/reader", "backbone/arch/hidden_act", "x"):
        for value in ({"_target_": target}, [{"_target_": target, "_partial_": True}]):
            with pytest.raises(UserError, match="is refused: saved configs set no key that builds"):
                load(plant_value(sound, place, value))
    assert set(sys.modules) == before


BUILDS = "is refused: saved configs set no key that builds something"
FORM = "the options on this machine have another form"
UNNAMED = "its option does not name it"
NUMBERS = "numbers up to"
ODD = {  # place, value, what the refusal says
    "arguments without names": ("data/reader/_args_", ["/", "train"], BUILDS),
    "convert": ("head/_convert_", "all", BUILDS),
    "called at once": ("head/_partial_", False, BUILDS),
    "mode": ("head/_mode_", "x", BUILDS),
    "a dunder": ("head/__class__", "x", BUILDS),
    "an empty key": ("head/", 1, BUILDS),
    "a key with a line break": ("head/a\nb", 1, BUILDS),
    "a key of no option": ("data/evil", 1, FORM),
    "a key of no group": ("trainer/evil", {"a": 1}, FORM),
    "an environment variable": ("data/root", "${oc.env:HOME}", BUILDS),
    "with blanks": ("data/root", "${ oc.env : HOME }", BUILDS),
    "within a text": ("data/root", "a ${oc.env:HOME} b", BUILDS),
    "a pointer": ("head/num_classes", "${data.num_classes}", BUILDS),
    "in a list": ("data/classes", ["a", "${seed}"], BUILDS),
    "a class file": ("data/root", "${dinoseg.class_file:classes}", BUILDS),
    "escaped": ("data/root", "\\${oc.env:HOME}", BUILDS),
    "put together by a sign": ("data/root", "$${data.on_error}", BUILDS),
    "places for counts": ("loss/counts/cache_dir", "/elsewhere", FORM),
    "no place": ("loss/counts/cache_dir", None, FORM),
    "a place in a class that has none": ("head/cache_dir", "/elsewhere", FORM),
    "preparing": ("data/prepare", {"root": "/"}, FORM),
    "masks elsewhere": ("data/tracking", {"folder": "/elsewhere"}, BUILDS),
    "masks above": ("data/tracking", {"folder": "masks/../.."}, BUILDS),
    "masks on a drive": ("data/tracking", {"folder": "C:\\up"}, BUILDS),
    "masks nowhere": ("data/tracking", {"folder": None}, BUILDS),
    "masks of a table": ("data/tracking", {"folder": {"a": "b"}}, BUILDS),
    "a number for what is built": ("data/reader/partition", 3, FORM),
    "a text for what is built": ("data/reader", "x", FORM),
    "a list for what is built": ("loss/criterion", [["a"]], FORM),
    "weights of nobody": ("backbone/weights", "~nobody-here/x", "Set its current path:"),
    "weights that were moved": ("backbone/weights", "/gone/vit.safetensors", "Set its current path:"),
    "weights of a long name": ("backbone/weights", "a" * 4000, UNNAMED),
    "weights of a broken name": ("backbone/weights", "a\0b", UNNAMED),
    "a hub of one's own": ("backbone/weights", "evil/weights", UNNAMED),
    "a request of a hub": ("backbone/weights", "facebook/dinov2-small@refs/pr/7", UNNAMED),
    "weights above the package": ("backbone/weights", "dinoseg:../../x", UNNAMED),
    "weights of a number": ("backbone/weights", 3, UNNAMED),
    "queries": ("head/num_classes", 10**12, NUMBERS),
    "a huge number below": ("head/num_classes", -(10**12), NUMBERS),
    "a width": ("backbone/arch/hidden_size", 2**40, NUMBERS),
    "a depth": ("backbone/arch/num_hidden_layers", 10**9, NUMBERS),
    "not a number": ("resolution/scale", float("nan"), NUMBERS),
    "infinity": ("optim/optimizer/lr", float("inf"), NUMBERS),
    "a scale": ("resolution/scale", 1e6, NUMBERS),
    "a crop": ("resolution/crop", [16384, 16384], "batches of"),
    "processes": ("data/workers", 10**5, NUMBERS),
    "a long table": ("data/reader/masks/ids", dict.fromkeys(map(str, range(6000)), 0), BUILDS),
    "a long text": ("data/root", "a" * 10**5, BUILDS),
}


@pytest.mark.parametrize(("place", "value", "says"), ODD.values(), ids=ODD)
def test_foreign_content_of_a_checkpoint_is_refused(sound, place, value, says):
    message = assert_refused(lambda: load(plant_value(sound, place, value)), says)
    assert message.startswith("resume=file: ") and message.isprintable()


def test_weights_are_given_to_classes_of_any_name(sound):
    names = ["it's", "a.b/c", "~", "k: v", "no", "1e3", "_background_", "h\xf6he", "grass (wet)"]
    weights = dict.fromkeys(names, 3.0)
    described = describe(compose_job(**{"loss.weights": weights}), KEYS)
    for stored in (described, plant_value(sound, "loss/weights", weights)):
        assert load(as_read(stored))["loss"]["weights"] == weights
    for name in ("_target_", "_partial_", "_args_", "_convert_", "_recursive_", "a\nb"):
        with pytest.raises(UserError, match=r"loss.weights.* is refused: saved configs set no key"):
            load(plant_value(sound, "loss/weights", {name: 3.0}))


def test_the_command_line_may_allow_a_source_of_weights(sound):
    commit = f"@{'a1' * 20}"
    for weights, options in (
        ("my-org/my-dino", {"trust": ["my-org/my-dino"]}),
        ("my-org/my-dino", {"typed": ["backbone.weights"]}),
        (f"facebook/dinov2-small{commit}", {}),
        (f"my-org/my-dino{commit}", {"trust": ["my-org/my-dino"]}),
        (f"my-org/my-dino{commit}", {"trust": [f"my-org/my-dino{commit}"]}),
    ):
        assert load(plant_value(sound, "backbone/weights", weights), **options)["backbone"]["weights"] == weights
    stored = plant_value(sound, "backbone/weights", f"my-org/my-dino{commit}")
    assert_refused(lambda: load(stored, trust=[f"my-org/my-dino@{'b2' * 20}"]), "its option does not name it")


def test_unused_groups_of_a_checkpoint_provide_only_values(sound):
    stored = {**sound, "choices": {**sound["choices"], "data": "gone", "loss": "gone"}}
    found = compose_stored(stored, Source("resume=file"), unused=("data", "loss"))
    assert found["data"]["num_classes"] == 2 and "_target_" not in json.dumps([found["data"], found["loss"]])
    planted = plant_value(stored, "loss/criterion", {"_target_": "x"})
    refuse = partial(compose_stored, planted, Source("resume=file"), unused=("loss",))
    assert_refused(refuse, "set no key that builds")


def test_a_config_file_of_a_run_is_read_as_a_checkpoint():
    cfg = to_container(compose_job(**{"data.batch_size": 3}))
    source = Source("config.yaml")
    found = compose_stored(description_of(cfg, ("data", "resolution"), source), source)
    assert found["data"] == cfg["data"] and found["data"]["batch_size"] == 3
    for key, value, says in (
        ("data.reader._target_", "os.system", "its data.reader is os.system"),
        ("data.reader._args_", ["x"], BUILDS),
        ("data.root", "${oc.env:HOME}", BUILDS),
        ("data.reader.partition._partial_", True, BUILDS),
    ):
        with pytest.raises(UserError, match=says):
            changed = to_container(compose_job(**{key: value}))
            compose_stored(description_of(changed, ("data", "resolution"), source), source)


def test_resolved_values_are_not_resolved_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    cfg = OmegaConf.create({"a": "$", "b": "{oc.env:SECRET}", "node": {"_target_": LINEAR, "x": "${a}${b}"}})
    with pytest.raises(UserError, match="is still an interpolation after it is resolved"):
        instantiate(cfg.node)


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("linear", "_target_: my.Head", "_target_", LINEAR),  # a shipped option comes before one in a folder
        ("mine", "defaults: [linear]\ndropout: 0.5", "dropout", 0.5),
        ("mine", "defaults: [linear, _self_]\ndropout: 0.5", "dropout", 0.5),
        ("mine", "defaults: [_self_, linear]\ndropout: 0.5", "dropout", 0.0),
    ],
)
def test_keys_of_options_follow_the_order_of_hydra(tmp_path, name, text, key, value):
    (tmp_path / "head").mkdir()
    (tmp_path / f"head/{name}.yaml").write_text(f"{text}\n")
    assert compose_options({"head": name}, [tmp_path])["head"][key] == value
    assert by_hydra(tmp_path, f"head={name}").head[key] == value


def test_options_are_found_where_hydra_finds_them(tmp_path):
    texts = {
        "head/mine": "{_target_: my.Head, norm: {_target_: my.Norm}}",
        "parts/a": "_target_: my.Part\n",
        "parts/b": "# @package head.last\n_target_: my.Last\n",
        "data/mine": "defaults: [/parts@first: a, /parts: a, other@y, _self_]\nx: 1\n",
        "data/other": "defaults: [deep/part: small]\nx: 2\n",
        "data/deep/part/small": "width: 3\n",
        "data/deep/part/large": "width: 4\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    chosen = {"data": "mine", "head": "mine", "parts@data.parts": "b", "data/deep/part@data.y.deep.part": "large"}
    found = compose_options(chosen, [tmp_path])
    head = {"lr": 1e-3, "_target_": "my.Head", "norm": {"_target_": "my.Norm"}, "last": {"_target_": "my.Last"}}
    assert found["head"] == head
    assert found["data"] == {
        "first": {"_target_": "my.Part"},
        "y": {"deep": {"part": {"width": 4}}, "x": 2},
        "x": 1,
    }
    cfg = by_hydra(tmp_path, *(f"{group}={option}" for group, option in chosen.items()))
    assert to_container(cfg.data) == found["data"] and to_container(cfg.head) == head
