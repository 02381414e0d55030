"""Print what each recipe's training step takes of a GPU's memory, as mode=plan estimates it, and what 24 GB asks for.

`python benchmarks/recipe_memory.py [--only camvid sarrarp_lora]`: for cards of 24, 48 and 80 GB (10^9 bytes each), in
bfloat16. Nothing is run: tensors are counted, and a GiB and 8 % added for CUDA's context, libraries and holes. Exits
with 1 where a recipe does not fit 24 GB as it is, but for those named in LARGE.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from tabulate import tabulate

import dinoseg
from dinoseg.config.job import job_config
from dinoseg.config.options import options_of
from dinoseg.config.resolvers import register_resolvers
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.auto.fitting import FitSearch
from dinoseg.extensions.auto.target import Target
from dinoseg.extensions.auto.training_parts import training_parts

GIB = 2**30
CARDS = (24, 48, 80)  # GB
LARGE = {"ade20k_m2f", "eomt_ade20k", "idd_m2f_vitb", "idd_m2f_vitl"}
CONFIGS = Path(dinoseg.__file__).parent / "cfg"
GIVEN = {  # what a recipe leaves to the user
    "schism_cnn": ("data.classes=[a,b]",),
    "schism_linear": ("data.classes=[a,b]",),
    "base": ("data.classes=[a,b]",),
    **dict.fromkeys(("ade20k_m2f", "idd_m2f", "idd_m2f_no_object"), ("head.weights=FILE",)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(options_of(CONFIGS / "hparam")))
    args = parser.parse_args()
    register_resolvers()
    rows, failed = [], False
    for recipe in args.only:
        cfg = config(recipe)
        fittings = [
            FitSearch(partial(training_parts, Builder(cfg)), Target("cuda", size * 10**9, bf16=True)) for size in CARDS
        ]
        need = fittings[0].as_it_is.need
        fits = ["yes" if need <= fitting.target.memory else "no" for fitting in fittings]
        found = fittings[0].find_fit() if fits[0] == "no" else fittings[0].as_it_is
        words = "nothing fits" if found is None else " ".join(map(str, found.changes))
        samples = f"{cfg.data.batch_size} x {cfg.trainer.accumulate}"
        rows.append((recipe, samples, need / GIB, *fits, words))
        print(rows[-1], file=sys.stderr, flush=True)
        failed |= fits[0] == "no" and recipe not in LARGE
    headers = ("recipe", "batch", "GiB", *(f"{size} GB" for size in CARDS), "for 24 GB")
    print(tabulate(rows, headers=headers, floatfmt=".1f", tablefmt="github"))
    return int(failed)


def config(recipe: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("main", [f"hparam={recipe}", *GIVEN.get(recipe, ())], return_hydra_config=True)
    return job_config(composed, composed.hydra)


if __name__ == "__main__":
    sys.exit(main())
