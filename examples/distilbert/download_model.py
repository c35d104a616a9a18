"""Fetches a teacher and a student from the hub into the folder where the other commands look for them.

python examples/distilbert/download_model.py
python examples/distilbert/download_model.py --teacher ID --student ID
"""

from pathlib import Path

from config import STUDENT, TEACHER, Settings, run_command
from huggingface_hub import snapshot_download
from models import first_line

FILES = ["config.json", "*.safetensors", "tokenizer*", "vocab.txt", "special_tokens_map.json"]  # nothing pickled


def main(settings: Settings) -> list[Path]:
    """Downloads both models, and returns their folders.

    Raises:
        ValueError: a model cannot be reached, or has no safetensors file.
    """
    named = {"teacher": settings.teacher or TEACHER, "student": settings.student or STUDENT}
    folders = []
    for name, source in named.items():
        folder = settings.out / "models" / name
        try:
            snapshot_download(source, local_dir=folder, allow_patterns=FILES)
        except Exception as error:  # of the network and of the hub, in many classes
            raise ValueError(f"the {name} {source} cannot be fetched ({first_line(error)})") from error
        if not [*folder.glob("*.safetensors")]:
            raise ValueError(f"the {name} {source} has no safetensors file, and pickled weights are never read")
        print(f"{source} is in {folder}")
        folders.append(folder)
    return folders


if __name__ == "__main__":
    run_command(main, Settings, __doc__)
