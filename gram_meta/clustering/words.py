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
    """English words that never name a topic: scikit-learn's list."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)


def tokens(text: str) -> Iterator[str]:
    """The words of a text, lower case: runs of two letters or more, in any script, without stop words.

    Digits, underscores and punctuation separate words: "dog's" is "dog", as its "s" is one letter.
    """
    return (word for word in _WORD.findall(text.lower()) if word not in stop_words())


def topic_words(
    captions: Iterable[str], topic: Iterable[int], topics: int, top: int = 10
) -> list[list[tuple[str, float]]]:
    """The best words of each topic with their scores, best first (Eq. 3).

    The captions of a topic are one document. With N_wl the number of times that word w occurs in topic l, N_l
    the number of words in topic l, L the number of topics and L_w the number of topics that contain w, the
    score of w in l is N_wl / N_l * log(L / (L_w + 1)). Equal scores: the word that occurs more often, then
    the alphabet.

    Args:
        captions: n texts. topic: n topic numbers in 0 ... topics - 1; -1: of no topic, left out.
        topics: L. top: how many words to return for each topic.

    Raises:
        GramError: fewer than three topics: then no score can be positive.
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
    return [_best(of_topic, containing, topics, top) for of_topic in counts]


def _best(counts: Counter[str], containing: Counter[str], topics: int, top: int) -> list[tuple[str, float]]:
    total = counts.total()  # N_l
    scores = {word: n / total * math.log(topics / (containing[word] + 1)) for word, n in counts.items()}
    return sorted(scores.items(), key=lambda item: (-item[1], -counts[item[0]], item[0]))[:top]
