"""What the command line names: models by their paths, inputs by their shapes."""

from pathlib import Path

import pytest

from ckptsched.base.errors import ProfileError
from ckptsched.cli.targets import Inputs, load_model, load_target, sample_input


@pytest.mark.parametrize("shape", ["8,3", "", "x", "8x", "0x3", "8x3x-1", "eight"])
def test_inputs_that_are_no_shape(shape: str) -> None:
    with pytest.raises(ProfileError) as caught:
        sample_input(shape)
    assert repr(shape) in str(caught.value)
    assert "such as 8x3x32x32" in str(caught.value)


def test_inputs() -> None:
    assert sample_input("2x3").tolist() == sample_input("2x3").tolist()
    assert str(sample_input("2x3", "float64").dtype) == "torch.float64"
    assert sample_input("5", "int64").tolist() == [0] * 5
    with pytest.raises(ProfileError, match="'int3' is unknown; give one of float32"):
        sample_input("2", "int3")
    with pytest.raises(ProfileError, match="no input of 2 on 'toaster'"):
        sample_input("2", device="toaster")


def refusal(target: str, **arguments: object) -> str:
    with pytest.raises(ProfileError) as caught:
        load_model(target, arguments)
    return str(caught.value)


def test_models_are_found_from_the_current_folder(folder: Path) -> None:
    assert len(list(load_model("nets_of_test:mlp", {"depth": 1}))) == 5
    assert len(list(load_model("nets_of_test:Zoo.mlp", {"depth": 1}))) == 5
    assert load_model("nets_of_test:ready") is load_model("nets_of_test:ready")
    first, second = (load_model("nets_of_test:mlp").state_dict() for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)
    target = load_target("nets_of_test:mlp", Inputs(shape="5x4"))
    assert target.model(target.sample).shape == (5, 2)


@pytest.mark.parametrize("target", ["nets_of_test", "nets_of_test:", ":mlp", "models/resnet.py"])
def test_a_path_of_no_form(folder: Path, target: str) -> None:
    assert "such as models.resnet:ode_resnet18" in refusal(target)


@pytest.mark.parametrize("target", ["nothing_of_test:mlp", "nothing_of_test.sub:mlp"])
def test_a_module_that_is_not_there(folder: Path, target: str) -> None:
    message = refusal(target)
    assert repr(target) in message
    assert "there is no module 'nothing_of_test'" in message
    assert str(folder) in message
    assert "run from the folder that holds it" in message


def test_a_module_that_needs_another(folder: Path) -> None:
    (folder / "needy_of_test.py").write_text("\nimport surely_missing\n")
    message = refusal("needy_of_test:mlp")
    assert "'needy_of_test' needs 'surely_missing', which is not installed" in message
    assert "needy_of_test.py, line 2" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("\n\n1 / 0\n", "ZeroDivisionError: division by zero"),
        ("\n\ndef f(:\n", "SyntaxError: "),
    ],
)
def test_a_module_that_fails(folder: Path, content: str, words: str) -> None:
    (folder / "failing_of_test.py").write_text(content)
    message = refusal("failing_of_test:mlp")
    assert "does not import" in message
    assert words in message
    assert "failing_of_test.py, line 3" in message


def test_a_name_that_is_not_there_lists_near_ones(folder: Path) -> None:
    message = refusal("nets_of_test:mpl")
    assert "has no 'mpl'; did you mean mlp?" in message
    assert "it has Zoo, mlp, not_a_model, ode, ready" in refusal("nets_of_test:qqqqqq")


def test_what_gives_no_model(folder: Path) -> None:
    assert "nets_of_test:not_a_model() returned str; it must return a torch.nn.Module" in refusal(
        "nets_of_test:not_a_model"
    )
    assert "is a int, not a callable" in refusal("nets_of_test:number")
    assert "takes no arguments" in refusal("nets_of_test:ready", a=1)


def test_a_callable_that_fails(folder: Path) -> None:
    message = refusal("nets_of_test:mlp", colour=3)
    assert "nets_of_test:mlp(colour=3) failed: TypeError" in message
    assert "colour" in message
    message = refusal("nets_of_test:mlp", activation="swish")
    assert "KeyError: 'swish'" in message
    assert "nets_of_test.py, line " in message
