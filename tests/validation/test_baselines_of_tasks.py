"""Baselines of stages whose rows are no plain texts."""

import numpy as np
import torch
from helpers import tiny

from hf_msif import MultiStageInfluence, Stage
from hf_msif.validation.baselines import baselines, representation, tfidf

ROWS, TESTS = tiny.rows_of_all_tasks(4, seed=1), tiny.rows_of_all_tasks(2, seed=2)


def found_by(task, architecture):
    model = tiny.model(architecture, task)
    msif = MultiStageInfluence([Stage("only", model, tiny.objective(task), ROWS)], progress=False)
    return model, baselines(msif, TESTS, ROWS, which=[representation, tfidf])


def test_the_representation_of_an_encoder_decoder_is_that_of_its_encoder():
    model, found = found_by("sequence to sequence", "bart")
    tokenizer, vectors = tiny.tokenizer(), []
    for row in [*ROWS, *TESTS]:
        with torch.no_grad():
            ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
            mean = model.eval().get_encoder()(input_ids=ids).last_hidden_state[0].mean(0).double().numpy()
        vectors.append(mean / np.linalg.norm(mean))
    corpus, tests = np.array(vectors[:4]), np.array(vectors[4:])
    np.testing.assert_allclose(found["representation"], corpus @ tests.T, rtol=1e-6)
    assert np.isfinite(found["tfidf"]).all()


def test_words_are_a_text():
    _, found = found_by("words", "bert")
    assert all(np.isfinite(values).all() for values in found.values())
