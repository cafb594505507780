"""How close texts are to their references, in percent.

ROUGE (Lin, 2004) is what rouge-score computes with stemming: the mean over the
examples of the F1 of unigrams, bigrams and longest common subsequences. BLEU
(Papineni et al., 2002) and chrF (Popović, 2015) are sacreBLEU's, over the corpus.
"""

from collections.abc import Sequence

import sacrebleu
from rouge_score import rouge_scorer

from experiments.data.registry import ROUGE

METRICS = (*ROUGE, "bleu", "chrf", "exact_match")
"""All that `score` can compute."""


def score(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """Compares predictions with references.

    Args:
        names: which of `METRICS` to compute.
        predictions: texts; white space at their ends never counts.
        references: the text that each prediction should be.

    Returns:
        The metrics by name, between 0 and 100.

    Raises:
        ValueError: a metric is unknown, there is nothing to score, or the numbers of
            predictions and references differ.
    """
    unknown = set(names) - set(METRICS)
    if unknown:
        raise ValueError(
            f"`names` has {', '.join(sorted(unknown))}, which is no metric here; "
            f"choose from {', '.join(METRICS)}"
        )
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"`predictions` must be as many as `references` and at least one, got "
            f"{len(predictions)} and {len(references)}"
        )
    predictions = [text.strip() for text in predictions]
    references = [text.strip() for text in references]
    scores = _rouge([n for n in ROUGE if n in names], predictions, references)
    if "bleu" in names:
        scores["bleu"] = sacrebleu.corpus_bleu(predictions, [references]).score
    if "chrf" in names:
        scores["chrf"] = sacrebleu.corpus_chrf(predictions, [references]).score
    if "exact_match" in names:
        same = sum(map(str.__eq__, predictions, references))
        scores["exact_match"] = 100 * same / len(references)
    return {name: float(scores[name]) for name in names}


def _rouge(
    names: list[str], predictions: list[str], references: list[str]
) -> dict[str, float]:
    scorer = rouge_scorer.RougeScorer(names, use_stemmer=True)
    pairs = zip(references, predictions, strict=True)
    scores = [scorer.score(*pair) for pair in pairs]
    return {n: 100 * sum(s[n].fmeasure for s in scores) / len(scores) for n in names}
