"""The owner's rules for KV that waits to be read."""

from baton.kv_transfer.leases import Lease, Leases, LeaseState
from baton.proto.config import LeaseConfig
from baton.proto.messages import FirstRows, Gone, Holder, Ok, Settled

CONFIG = LeaseConfig(unbound_s=10, holder_s=5, renew_interval_s=1, remember_s=60)
SID = (1, 7)
ME = Holder("decode-0", 11, SID, 1)
OTHER = Holder("decode-1", 12, SID, 1)
ROWS = FirstRows((42,))


def ready(leases: Leases, now: float = 0.0) -> Lease:
    lease = leases.create(SID, 1)
    leases.settle(lease, 20, [3, 4], ROWS, now)
    return lease


def test_the_first_to_open_holds_it_and_others_are_told_gone() -> None:
    leases = Leases(CONFIG)
    lease = ready(leases)
    assert leases.open(lease.id, ME, 1.0) == Settled(ME, lease.id, 20, (3, 4), ROWS)
    assert leases.open(lease.id, OTHER, 1.0) == Gone(OTHER, lease.id)
    assert leases.confirm(lease.id, OTHER, 1.0) == (Gone(OTHER, lease.id), None)


def test_it_is_consumed_once_and_the_same_confirm_hears_ok_again() -> None:
    leases = Leases(CONFIG)
    lease = ready(leases)
    assert leases.confirm(lease.id, ME, 1.0) == (Ok(ME, lease.id), lease)
    assert leases.confirm(lease.id, ME, 2.0) == (Ok(ME, lease.id), None)
    assert leases.confirm(lease.id, OTHER, 2.0) == (Gone(OTHER, lease.id), None)
    assert leases.expire(60.9) == []
    assert leases.expire(61.0) == []
    assert leases.confirm(lease.id, ME, 61.0) == (Gone(ME, lease.id), None)


def test_the_oldest_is_the_first_that_is_still_remembered() -> None:
    leases = Leases(CONFIG)
    first, second = ready(leases), ready(leases)
    assert leases.oldest == first.id
    leases.cancel(first)
    assert leases.oldest == second.id
    leases.cancel(second)
    assert leases.oldest == leases.create(SID, 1).id


def test_an_unbound_lease_expires_and_no_message_revives_it() -> None:
    leases = Leases(CONFIG)
    lease = ready(leases)
    # The clock decides when the message arrives, whether or not a sweep has run.
    assert leases.open(lease.id, ME, 10.0) == Gone(ME, lease.id)
    assert leases.expire(10.0) == [lease]
    assert lease.state is LeaseState.GONE
    assert leases.num_live == 0


def test_renewals_keep_it_and_silence_ends_it() -> None:
    leases = Leases(CONFIG)
    lease = ready(leases)
    for now in (4.0, 8.0, 12.0):
        assert isinstance(leases.open(lease.id, ME, now), Settled)
    assert leases.expire(16.9) == []
    assert leases.expire(17.0) == [lease]
    assert leases.confirm(lease.id, ME, 17.0) == (Gone(ME, lease.id), None)


def test_a_filling_lease_tells_what_has_settled_and_cannot_be_confirmed() -> None:
    leases = Leases(CONFIG)
    lease = leases.create(SID, 1)
    leases.settle(lease, 16, [3], None, 0.0)
    assert leases.open(lease.id, ME, 100.0) == Settled(ME, lease.id, 16, (3,), None)
    assert leases.confirm(lease.id, ME, 100.0) == (Gone(ME, lease.id), None)
    leases.settle(lease, 20, [3, 4], ROWS, 101.0)
    assert leases.expire(105.9) == []
    assert leases.expire(106.0) == [lease]


def test_another_attempt_of_the_same_stream_is_not_its_holder() -> None:
    leases = Leases(CONFIG)
    lease = ready(leases)
    later = Holder("decode-0", 11, SID, 2)
    assert leases.open(lease.id, later, 1.0) == Gone(later, lease.id)


def test_a_cancelled_lease_is_gone_for_its_holder() -> None:
    leases = Leases(CONFIG)
    lease = ready(leases)
    leases.open(lease.id, ME, 1.0)
    leases.cancel(lease)
    assert leases.confirm(lease.id, ME, 1.0) == (Gone(ME, lease.id), None)
    assert leases.num_live == 0


def test_only_unopened_ready_leases_are_told_again_to_a_new_scheduler() -> None:
    leases = Leases(CONFIG)
    leases.create(SID, 1)
    opened, unopened = ready(leases), ready(leases)
    leases.open(opened.id, ME, 1.0)
    assert leases.ready_unopened() == [unopened]


def test_who_offers_targets_hears_the_first_rows_with_every_answer() -> None:
    leases = Leases(CONFIG)
    lease = ready(leases)
    assert leases.confirm(lease.id, ME, 1.0, (7, 8)) == (Ok(ME, lease.id, ROWS), lease)
    assert leases.confirm(lease.id, ME, 2.0) == (Ok(ME, lease.id, ROWS), None)
