"""Compare the topics of the emoji world with the concepts that its pictures show.

    python scripts/experiments/agreement.py --hierarchy DIR/hierarchy --truth DIR/world/corpus/truth.tsv

Topics are compared on the pairs that have one. AMI is the adjusted mutual information, ARI the adjusted Rand index.
"""

import argparse
import csv
from collections import Counter

import numpy as np
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from tabulate import tabulate

from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.intervals import mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hierarchy", required=True)
    parser.add_argument("--truth", required=True, help="truth.tsv, in the order of the store's pairs")
    args = parser.parse_args()
    hierarchy = Hierarchy.open(args.hierarchy)
    with open(args.truth, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    concept = np.array([row["concept"] for row in rows])[hierarchy.pair]
    wrong = np.array([row["caption_is_wrong"] == "1" for row in rows])
    common = [Counter(concept[hierarchy.topic == number]).most_common(1)[0] for number in range(len(hierarchy.topics))]
    named = [topic.word.lower() in name.lower() for topic, (name, _) in zip(hierarchy.topics, common, strict=True)]
    found = {
        "topics": len(hierarchy.topics),
        "concepts": len({row["concept"] for row in rows}),
        "pairs in topics": f"{len(concept) / len(rows):.1%}",
        "wrong captions, of all and in topics": f"{wrong.mean():.1%}, {wrong[hierarchy.pair].mean():.1%}",
        "AMI": f"{adjusted_mutual_info_score(concept, hierarchy.topic):.2f}",
        "ARI": f"{adjusted_rand_score(concept, hierarchy.topic):.2f}",
        "pairs that show the commonest concept of their topic": f"{sum(n for _, n in common) / len(concept):.1%}",
        "concepts that are the commonest of a topic": len({name for name, _ in common}),
        "topics whose word is part of that concept's name": f"{mean(named):.1%}",
    }
    print(tabulate(found.items(), ["", ""], "pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
