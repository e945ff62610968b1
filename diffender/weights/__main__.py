"""Models from files: the embedded one, and official checkpoints in every layout they are published in.

python -m diffender weights fetch sd2-inpainting     download an official file and check its hash
python -m diffender weights fetch inception_v3       the same for a classifier of the paper
python -m diffender weights convert FILE.ckpt        a pickled official file to safetensors, running nothing in it
python -m diffender weights convert FOLDER           the same for the .bin files of a Hugging Face folder's model
python -m diffender weights inspect PATH             what a file or folder holds
"""

import argparse
from pathlib import Path

from diffender.utils.errors import InputError
from diffender.utils.options import Parser, run
from diffender.weights import official


def main() -> None:
    parser = Parser(prog="diffender weights", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download an official file and check its hash")
    fetch.add_argument("name", choices=official.FILES)
    convert = commands.add_parser("convert", help="a pickled official file to safetensors, running nothing in it")
    convert.add_argument("file", type=Path, help="a .ckpt or .bin file, or a Hugging Face folder")
    convert.add_argument("--out", type=Path, help="default: the same name with .safetensors")
    inspect = commands.add_parser("inspect", help="what a file or folder holds")
    inspect.add_argument("path", type=Path)
    args = parser.parse_args()
    if args.command == "fetch":
        print(official.fetch(args.name))
    elif args.command == "convert":
        file = args.file.expanduser()
        if file.is_dir() and args.out:
            raise InputError(f"--out {args.out} is for one file; those of a folder stay in it: leave it out")
        if file.is_dir():
            print("\n".join(map(str, official.convert_folder(file))) or f"all of {file} is converted already")
        else:
            print(official.convert(file, args.out or file.with_suffix(".safetensors")))
    else:
        from diffender.weights.loading import describe  # imports torch, which takes seconds
        from diffender.weights.reading import scan

        print(describe(scan(args.path)))


if __name__ == "__main__":
    run(main)
