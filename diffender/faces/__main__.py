"""How good a recogniser is: verification of clean pairs, as on LFW.

python -m diffender faces --pairs pairs.txt --data lfw --classifier facenet --classifier-weights vggface2.safetensors
"""

from dataclasses import dataclass
from pathlib import Path

from diffender.utils.errors import InputError
from diffender.utils.options import option, parse, run
from diffender.utils.progress import bar


@dataclass(frozen=True)
class Options:
    pairs: str = option("pairs.txt", "LFW's pairs.txt, or a csv with file_a, file_b and same (1 or 0).")
    data: str = option(".", "Folder of the pairs' files.")
    classifier: str = option("facenet", "The recogniser.", choices=("facenet", "mobilefacenet"))
    classifier_weights: str | None = option(None, "Safetensors file of the recogniser.")


def main() -> None:
    """Verification of clean pairs; FaceNet's published accuracy on LFW is 99.65 %."""
    opts = parse(Options, __doc__)
    # Imported after the options are known to be good: torch takes seconds.
    import torch

    from diffender.classifiers.dataset import load_image
    from diffender.classifiers.imagenet import Classifier
    from diffender.faces.identification import RECOGNIZERS, load_recognizer
    from diffender.faces.verification import read_pairs, verify

    table, root = Path(opts.pairs).expanduser(), Path(opts.data).expanduser()
    if not table.is_file():
        raise InputError(f"no pairs at {opts.pairs!r}; give LFW's pairs.txt, or a csv of file_a, file_b and same")
    cfg = RECOGNIZERS[opts.classifier]
    embed = Classifier(load_recognizer(opts.classifier, opts.classifier_weights), cfg)
    pairs = read_pairs(table, root)
    files = dict.fromkeys(file for a, b, _ in pairs for file in (a, b))
    known = {file: embed(load_image(file, cfg)[None])[0] for file in bar(files, "embedding")}
    distances = torch.stack([(known[a] - known[b]).square().sum() for a, b, _ in pairs])
    found = verify(distances, torch.tensor([same for _, _, same in pairs]))
    print(
        f"{100 * found.accuracy:.2f} % of {len(pairs)} pairs right, mean of 10 folds, {opts.classifier}, threshold "
        f"{found.threshold:.3f} of the squared distance of embeddings"
    )


if __name__ == "__main__":
    run(main)
