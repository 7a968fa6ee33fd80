"""The layout of CivilComments, adapters, and the experiment at its smallest."""

from __future__ import annotations

from pathlib import Path

import polars
import pytest
import torch

import culpa
from culpa.experiments import civilcomments as experiment
from culpa.experiments.classifier import BYTES, Classifier, LowRank, classifier
from culpa.experiments.data.civilcomments import civilcomments
from culpa.experiments.data.folder import DataFolder
from experiments import generated
from experiments.smoke import part, smoke

transformers = pytest.importorskip("transformers")
NOWHERE = DataFolder((Path("nowhere"),))


def test_smoke(tmp_path: Path) -> None:
    generated.civilcomments(tmp_path)
    smoke("civilcomments", tmp_path, DataFolder((tmp_path,)))
    stages = part(tmp_path, "civilcomments", "stages-0.01-0")
    assert min(stages["pearson"]["culpa's default (`effect`)"][0]) > 0.99
    removal = part(tmp_path, "civilcomments", "removal-0.01-0")
    assert len(removal["top"]["stages"]) == 3
    assert len(removal["bottom"]["stages"]) == 2
    assert not set(removal["top"]["stages"]) & set(removal["bottom"]["stages"])


def test_the_layout_is_read(tmp_path: Path) -> None:
    file = generated.civilcomments(tmp_path, count=20)
    found = civilcomments(DataFolder((tmp_path,)), required=True)
    assert found.toxic.tolist() == [i % 4 == 0 for i in range(20)]
    assert found.mentions("christian").tolist() == [i // 4 % 4 == 1 for i in range(20)]
    assert found.train.tolist() == [i % 5 != 4 for i in range(20)]
    assert found.texts[4] == "awful words, 4, with a comma on christian\nand a line"
    with pytest.raises(culpa.OptionError, match="no identity 'muslim'; it has male"):
        found.mentions("muslim")
    file.write_text(file.read_text().replace("toxicity", "poison", 1))
    with pytest.raises(culpa.IntegrityError, match="no column 'toxicity'"):
        civilcomments(DataFolder((tmp_path,)))


def test_the_stand_in_is_read_and_not_taken_for_it(tmp_path: Path) -> None:
    flags = {"id_male": [1, 0], "id_other_religion": [0, 1]}
    table = polars.DataFrame({"comment": ["a", "b"], "toxic": [0, 1], **flags})
    table.write_parquet(tmp_path / "toxicity.parquet")
    found = civilcomments(DataFolder((tmp_path,)))
    assert found.texts == ("a", "b")
    assert found.mentions("other_religions").tolist() == [False, True]
    assert "Jigsaw" in found.stand_in
    with pytest.raises(culpa.OptionError, match="WILDS"):
        civilcomments(DataFolder((tmp_path,)), required=True)


def test_adapters_begin_as_nothing_and_alone_are_trained() -> None:
    model, words = classifier(BYTES, 0, NOWHERE)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"A", "B", "weight"}
    assert [n for n, p in model.named_parameters() if p.requires_grad][-1] == "head.weight"
    layers = [m for m in model.modules() if isinstance(m, LowRank)]
    assert len(layers) == 2 * 3
    x = torch.randn(4, 16)
    assert torch.equal(layers[0](x), layers[0].base(x))
    with torch.no_grad():
        layers[0].B.normal_()
    wanted = x @ (layers[0].base.weight + layers[0].B @ layers[0].A).T
    torch.testing.assert_close(layers[0](x), wanted)
    # The answer is read off the last token, whatever pads the text.
    model.eval()
    short, long = words(["ab"], 2), words(["ab"], 6)
    torch.testing.assert_close(model(**short), model(**long))
    assert words(["", "abc"], 2)["attention_mask"].tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("width", "layers", "count"), [(512, 6, 99_328), (768, 12, 296_448), (1024, 24, 788_480)]
)
def test_trained_parameters_are_as_many_as_in_the_papers_table_4(
    width: int, layers: int, count: int
) -> None:
    """99K, 296K and 788K for Pythia-70M, -160M and -410M."""
    config = transformers.GPTNeoXConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=8, intermediate_size=8
    )
    with torch.device("meta"):
        model = Classifier(transformers.GPTNeoXModel(config), width, 2, 8)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_an_absent_model_is_named() -> None:
    with pytest.raises(culpa.OptionError, match=r"pythia-70m.*Hugging Face"):
        classifier("pythia-70m", 0, NOWHERE)


def test_training_and_test_comments_are_apart(tmp_path: Path) -> None:
    generated.civilcomments(tmp_path)
    comments = civilcomments(DataFolder((tmp_path,)))
    trained, tested = experiment.split(experiment.Options(group=2), comments, 0)
    assert not set(trained) & set(tested)
    assert not bool(comments.train[tested].any())
    groups = list(zip(comments.toxic[tested], comments.mentions("christian")[tested], strict=True))
    assert [groups.count(g) for g in set(groups)] == [2] * len(set(groups))
