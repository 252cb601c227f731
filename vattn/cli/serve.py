"""``vattn serve``: OpenAI's HTTP interface over a model."""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import closing

from ..engine import Engine
from ..errors import ConfigError
from .model import loaded_model, opened_cache, place_for

__all__ = ["serve"]


def serve(args: argparse.Namespace) -> None:
    """Run the command until a signal ends it.

    Raises:
        ConfigError: an argument, model, device, address or limit that cannot work; a package is missing.
    """
    try:
        from ..serve import run
        from ..serve.service import Settings
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"vattn serve needs the package {error.name}: pip install '.[hf,serve]' in a clone of vattn"
        ) from error
    from vattn.models.loader import load_tokenizer

    keys = _keys(args)
    names = tuple(args.served_model_name or [args.model])
    if not all(name.strip() and name.isprintable() for name in names):
        raise ConfigError(f"--served-model-name must be a name on one line, got {names}")
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with closing(run.listening_socket(args.host, args.port)) as opened:
        if not run.is_loopback(opened) and not keys and not args.no_api_key:
            raise ConfigError(
                f"--host {args.host} can be reached from other machines: give an --api-key, or --no-api-key to let "
                "everybody in"
            )
        place = place_for(args)
        tokenizer = load_tokenizer(place.path)
        with (
            loaded_model(place) as model,
            opened_cache(place, model, args.max_num_seqs) as cache,
            Engine(
                model,
                cache,
                max_batch=args.max_num_seqs,
                max_step_tokens=args.max_num_batched_tokens,
                max_waiting=args.max_queue,
                attention=place.attention,
                graphs=args.graphs,
            ) as engine,
        ):
            longest = min(engine.longest, cache.layout.max_seq_len)
            if args.max_model_len is not None and args.max_model_len > longest:
                raise ConfigError(
                    f"--max-model-len {args.max_model_len} exceeds the {longest} tokens that the model's context and "
                    "the cache's memory allow"
                )
            settings = Settings(
                model_names=names,
                max_model_len=args.max_model_len or longest,
                keys=keys,
                request_timeout_s=args.request_timeout,
                max_body_bytes=args.max_body_size,
                is_local=run.is_loopback(opened) and not keys and not args.no_api_key,
            )
            engine.warm_up()
            run.serve(
                engine,
                tokenizer,
                settings,
                opened,
                lambda url, _: print(f"vattn: serving {names[0]} at {url}/v1", flush=True),
            )


def _keys(args: argparse.Namespace) -> tuple[str, ...]:
    """Of the command line, else of the environment."""
    keys = args.api_key or [key for key in [os.environ.get("VATTN_API_KEY")] if key is not None]
    for key in keys:
        if not key.isascii() or not key.isprintable() or not key.strip() or " " in key:
            raise ConfigError("an API key must be printable ASCII without spaces")
    if keys and args.no_api_key:
        raise ConfigError("--no-api-key and an API key were given; give one of them")
    return tuple(keys)
