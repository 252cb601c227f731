"""Every way to run a decode step, and what measuring them chooses. See README.md; needs a GPU."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Records
from decoding import SHAPES, Setting, decoding, random_models, step_ms
from read_rate import add_limit

from vattn.tuning.choices import choices_for

NEEDS = ("cuda",)
LENGTH = 1024
BATCHES = (1, 2, 4, 8, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the 1B shape at batch 1 and 2 only")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    options = parser.parse_args()
    shapes, batches = (["1B"], BATCHES[:2]) if options.quick else (options.shapes, BATCHES)
    records = Records("04_decode", options.quick, [f"ways-{name}" for name in shapes])
    choices_for(torch.device("cuda", torch.cuda.current_device())).forget({"kind": "decode step"})  # to be made anew
    for name, model, ops in random_models(shapes):
        for batch in batches:
            case = f"ways-{name} B={batch} L={LENGTH}"
            kv_bytes = batch * LENGTH * model.kv_layout(LENGTH).bytes_per_token
            add_limit(records, case, "step", model.streamed_weight_bytes() + kv_bytes)
            for system, graphs in (("vattn", "always"), ("vattn-measured", "measure")):
                with records.going_on(case), decoding(model, batch, LENGTH, Setting(ops, graphs=graphs)) as loop:
                    records.add(case, system, "step", "ms", step_ms(loop))
                    (report,) = loop.graphs
                    for way, us in report.us.items():
                        records.add(case, way.replace(" + ", "-with-").replace(" ", "-"), "way", "us", [us])
                    print(f"{case}: {report.way or 'graph'}; failed: {dict(report.failed)}", flush=True)
                gc.collect()
    records.end()


if __name__ == "__main__":
    main()
