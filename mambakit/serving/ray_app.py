"""The same server on Ray Serve: the API in one deployment, its replicas as actors on the machines of the cluster.

    serve run mambakit.serving.ray_app:build model=state-spaces/mamba-130m-hf max_replicas=4 gpus_per_replica=1

Requests come through Ray Serve's proxies; from there on all is as in `mambakit serve`: queues, fairness, affinity of
prompts and states, restarts. A state that is kept in a folder of all machines moves with its conversation.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from mambakit.errors import UsageError
from mambakit.quoting import quoted
from mambakit.serving.http.access import AccessRules, check_hosts, check_origins
from mambakit.serving.http.app import make_app
from mambakit.serving.http.keys import Keys, read_keys
from mambakit.serving.logs import LogOptions, configure
from mambakit.serving.messages import WorkerOptions
from mambakit.serving.replicas.ray_actor import Place, RayReplica
from mambakit.serving.replicas.scaling import Scaling, ScalingOptions
from mambakit.serving.replicas.supervisor import Supervisor
from mambakit.serving.server import ServerOptions, make_dispatcher, make_intake, make_services
from mambakit.serving.states.options import StatesOptions
from mambakit.serving.states.remote import is_url
from mambakit.toml_files import read_toml


@dataclass(frozen=True)
class RayOptions:
    """What `build` takes besides the fields of `WorkerOptions` and `ServerOptions` that are plain values.

    Attributes:
        min_replicas, max_replicas: of the model; more than the least are started while texts wait.
        upscale_seconds, downscale_seconds: for which texts must wait before a replica is started, and for which one
            must not be needed before it is stopped.
        cpus_per_replica, gpus_per_replica: that Ray reserves for each.
        api_key_file: as the option of `mambakit serve`, read where the API runs.
        allowed_host, allowed_origin: the same, separated by commas.
        log_format, log_level: the same.
        states_mb, states_seconds: of the states in ``states_folder``: disk for them, and when they expire (0: never).
        config: a TOML file of arguments, read where `build` is called; the others replace its own.
    """

    min_replicas: int = 1
    max_replicas: int = 0
    upscale_seconds: float = 5.0
    downscale_seconds: float = 300.0
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    api_key_file: str = ""
    allowed_host: str = ""
    allowed_origin: str = ""
    log_format: str = "text"
    log_level: str = "info"
    states_mb: int = 16384
    states_seconds: float = 0.0
    config: str = ""


# Said by the cluster, or of a process of its own.
_ELSEWHERE = {"device", "sharers", "devices", "host", "port", "max_connections", "drain_seconds"}


def _plain(options: type) -> dict[str, type]:
    """The fields of a dataclass that are numbers, texts or flags, and their types."""
    hints, found = get_type_hints(options), {}
    for one in fields(options):
        hint = hints[one.name]
        if get_origin(hint) in (Union, types.UnionType):
            hint = next(kind for kind in get_args(hint) if kind is not type(None))
        if hint in (int, float, str, bool) and one.name not in _ELSEWHERE:
            found[one.name] = hint
    return found


_RAY, _WORKER, _SERVER = _plain(RayOptions), _plain(WorkerOptions), _plain(ServerOptions)


def _read(name: str, value: Any) -> Any:
    kind = {**_SERVER, **_WORKER, **_RAY}.get(name)
    if kind is None:
        raise UsageError(f"build has no argument {quoted(name)}; there are {', '.join([*_RAY, *_WORKER, *_SERVER])}")
    flag = {"true": True, "false": False}.get(str(value).lower())
    try:
        if kind is bool:
            if flag is None:
                raise ValueError
            return flag
        if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} is {quoted(value)}; it must be of type {kind.__name__}") from None


def read_arguments(arguments: Mapping[str, Any]) -> tuple[RayOptions, ServerOptions]:
    """The options of `build`'s arguments. Values from the command line are strings.

    Raises:
        UsageError: an argument is unknown, or not of its type.
    """
    config = arguments.get("config")
    given = {**(read_toml(_read("config", config)) if config else {}), **arguments}
    values = {name: _read(name, value) for name, value in given.items()}
    ray_options = RayOptions(**{name: value for name, value in values.items() if name in _RAY})
    ray_options = replace(ray_options, max_replicas=ray_options.max_replicas or ray_options.min_replicas)
    from mambakit.assets import default_model_path

    logs = LogOptions(ray_options.log_format, ray_options.log_level)
    of_worker = {"model": str(default_model_path())} | {n: v for n, v in values.items() if n in _WORKER}
    if of_worker.get("states_folder") and not is_url(of_worker["states_folder"]):  # prefixes are shared, too
        of_worker.setdefault("prefix_cache_folder", str(Path(of_worker["states_folder"]) / "prefixes"))
    worker = WorkerOptions(**of_worker, logs=logs)
    states = StatesOptions(ray_options.states_mb << 20, ray_options.states_seconds or None)
    kind = "cuda" if ray_options.gpus_per_replica else "cpu"
    of_server: dict[str, Any] = {"name": Path(worker.model).name if Path(worker.model).is_dir() else worker.model}
    of_server |= {name: value for name, value in values.items() if name in _SERVER}
    return ray_options, ServerOptions(
        worker=worker, devices=(kind,) * ray_options.max_replicas, logs=logs, access=_access(ray_options),
        states=states, **of_server,
    )  # fmt: skip


def _access(options: RayOptions) -> AccessRules:
    """Hosts and origins; keys are read where the API runs."""
    return AccessRules(
        hosts=check_hosts(filter(None, options.allowed_host.split(","))),
        origins=check_origins(filter(None, options.allowed_origin.split(","))),
        loopback=False,  # what address a proxy has is the cluster's matter
    )


def build(arguments: Mapping[str, Any]) -> Any:
    """Ray Serve's application: for `serve run`, `serve.run`, or the ``import_path`` of a Serve file.

    Args:
        arguments: fields of `RayOptions`, `WorkerOptions` and `ServerOptions`, by name.

    Raises:
        UsageError: an argument is wrong.
        ModuleNotFoundError: Ray is not installed; the message names the extra.
    """
    from ray import serve

    ray_options, options = read_arguments(arguments)
    scaling = ScalingOptions(
        ray_options.min_replicas, ray_options.max_replicas, up_seconds=ray_options.upscale_seconds,
        down_seconds=ray_options.downscale_seconds,
    )  # fmt: skip
    place = Place(ray_options.cpus_per_replica, ray_options.gpus_per_replica)

    def make() -> Any:  # Serve tells what makes an application from an application by its being a plain function
        return make_asgi(options, scaling, place, ray_options.api_key_file)

    @serve.deployment(name="mambakit", num_replicas=1, max_ongoing_requests=100_000, graceful_shutdown_timeout_s=60.0)
    @serve.ingress(make)
    class Mambakit:
        """The API; the replicas of the model are its actors."""

    application: Any = Mambakit
    return application.bind()


def make_asgi(options: ServerOptions, scaling: ScalingOptions, place: Place, api_key_file: str) -> Any:
    """The ASGI application, in the process that serves it. The replicas start and stop with it."""
    import os

    configure(options.logs)
    keys = read_keys(None, api_key_file, os.environ) if api_key_file else Keys()
    access = replace(options.access, keys=keys)
    dispatcher, intake = make_dispatcher(options), make_intake(options)

    def failed(reason: str) -> None:
        dispatcher.fail_all(reason)  # the next requests are told which replica has failed, and why

    supervisor = Supervisor(
        options.worker, dispatcher, failed, functools.partial(RayReplica, place=place), sharing=False,
        scaling=Scaling(scaling, options.worker.slots),
    )  # fmt: skip
    services = make_services(options, access, dispatcher, intake)
    return make_app(services, supervisor, failed, options.worker.model if options.playground else None)
