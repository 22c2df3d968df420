"""Topic words: the cluster-wise TF-IDF of Eq. 3."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache

from gram_meta.errors import GramError

_WORD = re.compile(r"[^\W\d_]{2,}")


@lru_cache(maxsize=1)
def stop_words() -> frozenset[str]:
    """Return English words that never name a topic: scikit-learn's list."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)


def tokens(text: str) -> Iterator[str]:
    """Yield the words of a text in lower case: runs of two or more letters of any script, without stop words.

    Digits, underscores and punctuation separate words: "dog's" gives "dog", as its "s" is one letter.
    """
    return (word for word in _WORD.findall(text.lower()) if word not in stop_words())


def topic_words(
    captions: Iterable[str], topic: Iterable[int], topics: int, top: int = 10
) -> list[list[tuple[str, float]]]:
    """Return the best words of each topic with their scores, best first (Eq. 3).

    The captions of a topic are one document. The score of word w in topic l is N_wl / N_l * log(L / (L_w + 1)): w
    occurs N_wl times among the N_l words of topic l, and L_w of the L topics contain w. Among equal scores, the word
    that occurs more often comes first, then the alphabet decides.

    Args:
        captions: n texts. topic: n topic numbers in 0 ... topics - 1; -1: in no topic.
        topics: L. top: number of words for each topic.

    Raises:
        GramError: fewer than three topics, so that no score can be positive.
    """
    if topics < 3:
        raise GramError(
            f"topics: expected at least 3, found {topics}; a topic's word is the one with the highest "
            f"N_wl/N_l * log(L/(L_w+1)) (Eq. 3), and with L = {topics} topics no such score is above 0; "
            "give more pairs, or lower CHC.TOPICS.MIN_CLUSTER_SIZE"
        )
    counts: list[Counter[str]] = [Counter() for _ in range(topics)]  # N_wl
    for caption, number in zip(captions, topic, strict=True):
        if number >= 0:
            counts[number].update(tokens(caption))
    containing = Counter(word for of_topic in counts for word in of_topic)  # L_w
    weight = {word: math.log(topics / (number + 1)) for word, number in containing.items()}
    best = []
    for of_topic in counts:
        total = of_topic.total()  # N_l
        scores = [(word, n / total * weight[word], n) for word, n in of_topic.items()]
        scores.sort(key=lambda item: (-item[1], -item[2], item[0]))
        best.append([(word, score) for word, score, _ in scores[:top]])
    return best
