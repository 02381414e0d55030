"""mode=app: browser app that segments images and videos, tracks painted objects, and shows features."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.checkpoints.source import ModelSource
from dinoseg.extensions.serving.app import App
from dinoseg.extensions.serving.endpoint import build_endpoint
from dinoseg.extensions.serving.features_tab import UploadFeatures
from dinoseg.extensions.serving.page import PageContext
from dinoseg.extensions.serving.server import Port, bind_socket, list_hosts, serve_until_signal
from dinoseg.extensions.serving.shared import SharedModel
from dinoseg.extensions.serving.source import load_served, open_views, tracker_maker
from dinoseg.extensions.tracking.trackers import tracker_factory
from dinoseg.utils.atomic import scratch_folder
from dinoseg.utils.ranges import Count, Positive, Share


def app(
    cfg: DictConfig,
    *,
    out_dir: Path,
    model: str | None,
    host: str,
    port: Port,
    hosts: Sequence[str],
    max_mib: Positive,
    max_pixels: Count,
    timeout: Positive,
    min_score: Share,
    max_seconds: Positive,
) -> dict[str, Any]:
    """Serve the app, and the endpoint of mode=serve, until SIGINT or SIGTERM.

    Raises:
        UserError: there is no model, the port is taken, or `hosts` or `cfg.tracker` are invalid.
    """
    accepted = list_hosts(host, hosts)
    make_tracker = tracker_factory(cfg.tracker, f"tracker={cfg.choices.tracker}")
    run = Path(out_dir)
    with bind_socket(host, port) as listener, scratch_folder(run.parent, "uploads") as uploads:
        served = load_served(ModelSource(cfg), run, model)
        with closing(SharedModel(served, max_pixels, timeout=timeout, min_score=min_score)) as shared:
            application = build_endpoint(shared, uploads, hosts=accepted, max_mib=max_mib)
            views = open_views(served)
            features = UploadFeatures(shared, views) if views else None
            track_masks, track_objects = (tracker_maker(make_tracker, served, least) for least in (None, min_score))
            context = PageContext(shared, uploads, track_masks, max_mib, max_seconds, features, track_objects)
            App(context).mount(application)
            serve_until_signal(application, listener, shared.stop)
    return {"run": str(out_dir)}
