"""Prints the architecture of the first GPU as CMake names it; fails where there is none."""

import sys


def main() -> None:
    try:
        import torch
    except ImportError:
        sys.exit(f"{sys.executable} has no PyTorch: name one that has with GPU_PYTHON=...")
    if torch.version.cuda is None:
        sys.exit(
            f"the PyTorch of {sys.executable} ({torch.__version__}) is built without CUDA: name "
            "another Python with GPU_PYTHON=..."
        )
    if not torch.cuda.is_available():
        sys.exit(f"PyTorch {torch.__version__} of {sys.executable} finds no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}{minor}-real")


if __name__ == "__main__":
    main()
