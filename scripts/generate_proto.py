"""Regenerates the code of proto/*.proto, or with --check says whether what is checked in is current.

The sources import each other as octavo/proto/NAME.proto, so that the generated modules import as octavo.proto.NAME_pb2.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTO_DIR = Path(__file__).resolve().parent.parent / "proto"


def generate(out_dir: Path) -> dict[str, bytes]:
    """Runs protoc into `out_dir`; returns file name to content."""
    sources = sorted(f"octavo/proto/{path.name}" for path in PROTO_DIR.glob("*.proto"))
    arguments = ["protoc", f"-Ioctavo/proto={PROTO_DIR}", f"--python_out={out_dir}", f"--pyi_out={out_dir}"]
    with_services = [s for s in sources if "\nservice " in (PROTO_DIR / Path(s).name).read_text()]
    for call in (arguments + sources, [*arguments[:2], f"--grpc_python_out={out_dir}", *with_services]):
        if protoc.main(call) != 0:
            sys.exit("protoc failed")
    return {path.name: path.read_bytes() for path in sorted((out_dir / "octavo" / "proto").iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a file is not current")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        generated = generate(Path(scratch))
    present = {path.name: path.read_bytes() for path in PROTO_DIR.glob("*_pb2*.py*")}
    stale = sorted(name for name in generated.keys() | present.keys() if generated.get(name) != present.get(name))
    if check:
        sys.exit(f"not current, run `make proto`: {', '.join(stale)}" if stale else 0)
    for name in stale:
        if name in generated:
            (PROTO_DIR / name).write_bytes(generated[name])
        else:
            (PROTO_DIR / name).unlink()
    print(f"{len(stale)} of {len(generated)} files changed")


if __name__ == "__main__":
    main()
