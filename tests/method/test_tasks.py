"""Invariants of meta-training tasks, over generated hierarchies."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_meta.errors import GramError
from gram_meta.method.tasks import TaskConfig, TaskSampler, images_of, split_topics, what_tasks_allow

WAYS, SUPPORT, QUERY = 3, 2, 5


def make_hierarchy(sizes, words, shared=0, seed=0):
    """Topics with the given images per domain; `shared` images occur in two topics."""
    random = np.random.default_rng(seed)
    topic, domain = [], []
    for number, domains in enumerate(sizes):
        for u, size in enumerate(domains):
            topic += [number] * size
            domain += [u] * size
    image = random.permutation(len(topic))
    for _ in range(shared):
        a, b = random.integers(len(topic), size=2)
        image[a] = image[b]
    topics = [SimpleNamespace(word=word, domains=domains) for word, domains in zip(words, sizes, strict=True)]
    return SimpleNamespace(topics=topics, image=image, topic=np.array(topic), domain=np.array(domain))


hierarchies = st.integers(4, 9).flatmap(
    lambda topics: st.builds(
        make_hierarchy,
        st.lists(st.lists(st.integers(6, 9), min_size=2, max_size=4), min_size=topics, max_size=topics),
        st.permutations([f"word{i % (topics - 1)}" for i in range(topics)]),  # two topics share a word
        shared=st.integers(0, 4),
        seed=st.integers(0, 99),
    )
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(hierarchies, st.integers(0, 1000), st.booleans())
def test_tasks_keep_their_promises(hierarchy, number, shift):
    sampler = TaskSampler(hierarchy, TaskConfig(WAYS, SUPPORT, QUERY, shift), seed=1)
    task = sampler.draw(number)
    domains_of = {}
    for t, u, i in zip(hierarchy.topic, hierarchy.domain, hierarchy.image, strict=True):
        domains_of.setdefault((t, i), set()).add(u)

    assert task.support.shape == (WAYS, SUPPORT) and task.query.shape == (WAYS, QUERY)
    assert len({word.lower() for word in task.words}) == WAYS
    assert list(task.words) == [hierarchy.topics[t].word for t in task.topics]
    images = np.concatenate([task.support.ravel(), task.query.ravel()])
    assert len(np.unique(images)) == len(images)
    for k, topic in enumerate(task.topics):
        assert all((topic, image) in domains_of for image in [*task.support[k], *task.query[k]])
        if shift:  # one domain has all the support images
            assert set.intersection(*(domains_of[topic, image] for image in task.support[k]))
            seen = set.union(*(domains_of[topic, image] for image in task.query[k]))
            assert seen == set(range(len(hierarchy.topics[topic].domains)))

    again = TaskSampler(hierarchy, TaskConfig(WAYS, SUPPORT, QUERY, shift), seed=1)
    again.draw(number + 1)  # what was drawn before makes no difference
    same = again.draw(number)
    assert same.words == task.words and (same.support == task.support).all() and (same.query == task.query).all()


def test_query_sets_are_stratified_over_domains():
    hierarchy = make_hierarchy([[40, 20, 10]] * 4, ["a", "b", "c", "d"])
    task = TaskSampler(hierarchy, TaskConfig(3, 4, 12), seed=0).draw(5)
    for k in range(3):
        where = [hierarchy.domain[np.flatnonzero(hierarchy.image == i)[0]] for i in task.query[k]]
        assert np.bincount(where).tolist() == [4, 4, 4]


def test_support_takes_each_domain_in_turn_and_all_of_them_without_shift():
    hierarchy = make_hierarchy([[20, 20]] * 3, ["a", "b", "c"])

    def support_domains(shift):
        sampler = TaskSampler(hierarchy, TaskConfig(3, 4, 4, shift), seed=0)
        rows = [row for number in range(30) for row in sampler.draw(number).support]
        return [tuple(sorted(hierarchy.domain[np.isin(hierarchy.image, row)])) for row in rows]

    assert set(support_domains(True)) == {(0, 0, 0, 0), (1, 1, 1, 1)}
    assert set(support_domains(False)) == {(0, 0, 1, 1)}


def test_seeds_and_numbers_differ():
    hierarchy = make_hierarchy([[20, 20]] * 6, "abcdef")
    drawn = [TaskSampler(hierarchy, TaskConfig(3, 2, 5), seed=s).draw(n).query.tolist() for s in (1, 2) for n in (0, 1)]
    assert len({str(d) for d in drawn}) == 4


def test_too_few_topics_is_one_sentence():
    hierarchy = make_hierarchy([[20, 20]] * 3, ["a", "A", "b"])
    with pytest.raises(GramError, match="TASKS.WAYS: expected at least 3 topics with different words .* found 2"):
        TaskSampler(hierarchy, TaskConfig(3, 2, 5), seed=0)
    with pytest.raises(GramError, match="found 0"):  # one domain each is no domain shift
        TaskSampler(make_hierarchy([[20]] * 4, "abcd"), TaskConfig(3, 2, 5), seed=0)


def test_held_out_topics_share_no_word_and_no_image():
    hierarchy = make_hierarchy([[20, 20]] * 12, [*"abcdefghij", "a", "b"], shared=30)
    train, held = split_topics(hierarchy, 0.3, 3, seed=1)
    assert sorted(train + held) == list(range(12)) and len(held) >= 3
    words = [{hierarchy.topics[t].word for t in side} for side in (train, held)]
    assert not words[0] & words[1]
    away = images_of(hierarchy, held)
    sampler = TaskSampler(hierarchy, TaskConfig(3, 2, 5), seed=1, topics=train, without_images=away)
    for number in range(20):
        task = sampler.draw(number)
        assert set(task.topics) <= set(train) and not np.isin([*task.support.ravel(), *task.query.ravel()], away).any()
    with pytest.raises(GramError, match="at least 14 topics"):
        split_topics(hierarchy, 0.3, 7, seed=1)


def test_images_with_captions_in_several_topics_occur_once_in_a_task():
    hierarchy = make_hierarchy([[30, 30]] * 4, "abcd")
    random = np.random.default_rng(0)
    hierarchy.image = np.concatenate([random.choice(90, 60, replace=False) for _ in range(4)])  # 2 of 3 in each topic
    sampler = TaskSampler(hierarchy, TaskConfig(3, 2, 10), seed=0)
    for number in range(30):
        task = sampler.draw(number)
        images = np.concatenate([task.support.ravel(), task.query.ravel()])
        assert len(np.unique(images)) == len(images)


def test_what_tasks_allow():
    """Five of six topics are large enough, [2, 2] is not; two of them share a word, so that there are four words."""
    sizes = [[6, 6], [6, 6], [6, 6], [6, 6], [2, 2], [9, 1]]
    hierarchy = make_hierarchy(sizes, ["cat", "dog", "sea", "Sea", "sky", "hut"])
    found = "tasks: 5 of 6 topics, with 4 different words, hold 2 support and 5 query images"
    assert what_tasks_allow(hierarchy, TaskConfig(2, 2, 5)) == (
        f"{found}; meta-training can take TASKS.WAYS up to 2, and has 2"
    )
    assert what_tasks_allow(hierarchy, TaskConfig(3, 2, 5)).startswith(f"{found}, which allows TASKS.WAYS 2 and not 3")


def structured(clusters):
    """Topics on a circle, one after the other; the images of topic l lie around 10 * l degrees, by up to l degrees."""
    hierarchy = make_hierarchy([[6, 6]] * clusters, [f"word{number}" for number in range(clusters)])
    angle = np.empty(len(hierarchy.image))
    angle[hierarchy.image] = 10 * hierarchy.topic + hierarchy.topic * np.linspace(-1, 1, len(hierarchy.image))
    return hierarchy, np.stack([np.cos(np.radians(angle)), np.sin(np.radians(angle))], axis=1)


def test_near_topics_are_neighbours_in_random_order():
    hierarchy, features = structured(18)
    sampler = TaskSampler(hierarchy, TaskConfig(WAYS, SUPPORT, QUERY, choice="near"), seed=0, features=features)
    drawn = [sampler.draw(number).topics for number in range(200)]
    assert max(np.ptp(topics) for topics in drawn) == 2 * WAYS - 1  # of the 6 nearest
    assert {topic for topics in drawn for topic in topics.tolist()} == set(range(18))
    assert len({tuple(topics) for topics in drawn}) > 100
    again = TaskSampler(hierarchy, TaskConfig(WAYS, SUPPORT, QUERY, choice="near"), seed=0, features=features)
    assert (again.draw(7).topics == drawn[7]).all()


def test_near_topics_that_cannot_fill_a_task_give_way_to_the_next():
    hierarchy, features = structured(18)
    for topic in hierarchy.topics[:9]:
        topic.word = "the same"
    sampler = TaskSampler(hierarchy, TaskConfig(WAYS, SUPPORT, QUERY, choice="near"), seed=0, features=features)
    drawn = [sorted(sampler.draw(number).topics) for number in range(200)]
    assert any(topics[0] < 3 and topics[1:] == [9, 10] for topics in drawn)


def test_varied_topics_are_drawn_more_often():
    hierarchy, features = structured(10)
    sampler = TaskSampler(hierarchy, TaskConfig(2, SUPPORT, QUERY, choice="varied"), seed=0, features=features)
    first = np.bincount([sampler.draw(number).topics[0] for number in range(4000)], minlength=10) / 4000
    assert first == pytest.approx(np.arange(1, 11) / 55, abs=0.025)  # by rank, 4 standard deviations


def test_a_choice_by_structure_needs_features():
    hierarchy, _ = structured(6)
    with pytest.raises(ValueError, match="TASKS.TOPICS near: expected image features, found None"):
        TaskSampler(hierarchy, TaskConfig(WAYS, SUPPORT, QUERY, choice="near"), seed=0)
    assert "meta-training can take" in what_tasks_allow(hierarchy, TaskConfig(WAYS, SUPPORT, QUERY, choice="near"))
