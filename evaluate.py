"""Evaluate DIFFender under adaptive patch attacks.

    python evaluate.py                                  embedded model, sample photographs, AdvP; minutes on 2 cores
    python evaluate.py --attack gdpa --eot 10           another attack; --attack all runs the paper's four
    python evaluate.py --grad bpda,bpda-mask,full       one attack after the other, each with its row in the table
    python evaluate.py --defense jpeg:quality=50        a baseline under the same attacks
    python evaluate.py --table 1                        a table of the paper: every defence, the four attacks
    python evaluate.py --figure 5                       a figure of the paper, from our images
    python evaluate.py --preset paper --data DATA       the paper's protocol: 512 images, 100 steps, BPDA and EOT
    python evaluate.py --preset strong --data DATA      every gradient, EOT 10, 3 restarts

Patches are made on the classifier alone first (transfer), then on the defence itself, starting from those, with each
kind of gradient that --grad lists and fresh noise for each of --eot samples. Verdicts fall on 8-bit files, after
--verdicts purifications with noise that no attack has seen. In the headline an image counts as right only if it is
right under every patch made for it. For the average verdict the lowest average of its patches counts. Everything goes
to runs/<name>/; a killed run resumes with --name, and shards of one run may share a folder: --name big --shard 0/2 and
--name big --shard 1/2, at once or one after the other.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports shows no traceback; `run` listens again

import json

from diffender.evaluation.options import Options, is_ours, names, refuse_conflicts, refuse_unread, with_preset
from diffender.evaluation.plan import sources
from diffender.evaluation.records import read_records
from diffender.utils.options import parse, run


def main() -> None:
    given = parse(Options, __doc__)
    refuse_conflicts(given)
    if given.list:
        print(names())
        return
    # Imported after the options are known to be good: torch and timm take seconds.
    refuse_unread(given)
    from diffender.evaluation.memory import GIB, most_held_bytes
    from diffender.evaluation.plan import refuse_unused_eot
    from diffender.evaluation.run import finish, load_images, prepare, work
    from diffender.evaluation.workers import is_first, join, wait
    from diffender.report.folder import write_report
    from diffender.report.tables import markdown

    given = join(given)
    opts = with_preset(given)
    if opts.table is not None or opts.figure is not None:
        from diffender.paper.figures import run_figure
        from diffender.paper.tables import run_table

        print(run_table(opts.table, given) if opts.table is not None else run_figure(opts.figure, given))
        return
    experiment = prepare(opts)
    refuse_unused_eot(given.eot, experiment.opts)
    batch = load_images(opts, experiment.target)
    done = len(read_records(experiment.folder).keys() & set(batch.ids))
    if not opts.run.quiet:
        prompt = f"{opts.target.defense.prompt_kind} prompts; " if is_ours(opts) else ""
        print(f"{prompt}{experiment.device}; {done} images done before; results in {experiment.folder}")
    work([experiment], batch)
    if opts.dry_run:
        print(json.dumps(experiment.config | {"settings from": sources(opts)}, indent=1))
        return
    wait()
    if is_first() and finish(experiment, batch) is not None:
        results = write_report(experiment.folder)
        print(f"\n{markdown(results)}")
        if not opts.run.quiet:
            print(f"images and all else: {experiment.folder / 'report.html'}")
            print(f"peak memory {most_held_bytes(experiment.device) / GIB:.1f} GiB")


if __name__ == "__main__":
    run(main)
