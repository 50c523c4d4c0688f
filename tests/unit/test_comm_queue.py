"""The communication thread, by itself."""

import threading
import time
import weakref

import pytest
from waiting import is_freed

from hpc_dl.comm.queue import CommQueue


@pytest.fixture(params=[True, False], ids=["threaded", "in the caller"])
def calls(request):
    made = CommQueue("test", threaded=request.param)
    yield made
    made.close()


def test_calls_are_made_in_their_order(calls):
    made = []
    works = [calls.submit(lambda i=i: made.append(i)) for i in range(50)]
    assert calls.run(lambda: len(made)) == 50
    assert made == list(range(50))
    assert all(work.done() for work in works)


def test_an_error_is_raised_where_it_is_waited_for(calls):
    def fail():
        raise ValueError("no such thing")

    work = calls.submit(fail)
    with pytest.raises(ValueError, match="no such thing"):
        work.wait()
    assert calls.submit(lambda: 7).wait() == 7


def test_a_call_within_a_call_does_not_wait_for_itself(calls):
    assert calls.submit(lambda: calls.run(lambda: 3) + 1).wait() == 4


def test_nothing_is_kept_of_a_call_that_is_over(calls):
    """A model's last reduction would keep the model until the next one."""

    class Model:
        def reduced(self):
            return self

    model = Model()
    kept = weakref.ref(model)
    assert calls.submit(model.reduced).wait() is model
    del model
    assert is_freed(kept)


def test_two_threads_are_never_in_calls_at_once(calls):
    inside, most = [], []

    def call():
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.001)
        inside.pop()

    threads = [
        threading.Thread(target=lambda: [calls.run(call) for _ in range(20)]) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    works = [calls.submit(call) for _ in range(20)]
    for thread in threads:
        thread.join(30)
    assert all(work.wait() is None for work in works)
    assert max(most) == 1
