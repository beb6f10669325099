//! Records of a few ranks, and what is said of them.

use super::super::flight::Activity;
use super::*;

fn entry(seq: u64, activity: Activity, state: State) -> FlightEntry {
    let ended_ns = if state == Completed { seq * 1_000_000_000 + 500 } else { 0 };
    let site = format!("train.rs:{}", 10 + seq);
    FlightEntry {
        seq,
        activity,
        bytes: 4,
        state,
        started_ns: seq * 1_000_000_000,
        ended_ns,
        site,
        peer: None,
        tag: None,
    }
}

fn dump(rank: usize, entries: Vec<FlightEntry>) -> FlightDump {
    let group = GroupRecord { name: "0".to_owned(), ranks: vec![0, 1, 2], entries };
    FlightDump {
        rank,
        world_size: 3,
        pid: 1,
        reason: "request".to_owned(),
        at_ns: 60_000_000_000,
        groups: vec![group],
    }
}

use Activity::{AllReduce, Barrier, Broadcast, Recv, Send};
use State::{Completed, Started};

#[test]
fn a_rank_that_skips_a_collective_is_named_with_the_call_it_did_not_make() {
    let waits = || vec![entry(0, AllReduce, Completed), entry(1, Barrier, Started)];
    let d = diagnose(&[dump(0, waits()), dump(1, vec![entry(0, AllReduce, Completed)]), dump(2, waits())]);
    assert_eq!(d.suspects, [1]);
    let text = d.to_string();
    for part in
        ["rank 1 finished all_reduce number 0 (train.rs:10)", "has not called barrier number 1", "own code"]
    {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_hang_of_all_ranks_in_one_call_is_the_communications() {
    let waits = || vec![entry(4, AllReduce, Started)];
    let d = diagnose(&[dump(0, waits()), dump(1, waits()), dump(2, waits())]);
    assert!(d.to_string().contains("the hang is in the communication"), "{d}");
    assert!(d.suspects.is_empty());
}

#[test]
fn a_rank_without_a_record_is_named() {
    let waits = || vec![entry(4, AllReduce, Started)];
    let d = diagnose(&[dump(0, waits()), dump(2, waits())]);
    assert_eq!(d.suspects, [1]);
    assert!(d.findings[0].contains("rank 1 left no record"), "{d}");
}

#[test]
fn the_odd_one_of_a_disagreement_is_named() {
    let d = diagnose(&[
        dump(0, vec![entry(7, AllReduce, Started)]),
        dump(1, vec![entry(7, Broadcast, Started)]),
        dump(2, vec![entry(7, AllReduce, Started)]),
    ]);
    assert_eq!(d.suspects, [1]);
    assert!(d.findings[0].contains("rank 1 called broadcast (train.rs:17)"), "{d}");
}

#[test]
fn ranks_that_all_finished_are_no_finding() {
    let done = || vec![entry(0, AllReduce, Completed)];
    let d = diagnose(&[dump(0, done()), dump(1, done()), dump(2, done())]);
    assert!(d.suspects.is_empty() && !d.hangs && d.to_string().contains("nothing hangs"), "{d}");
}

fn message(seq: u64, activity: Activity, peer: usize, tag: u32, state: State) -> FlightEntry {
    FlightEntry { peer: Some(peer), tag: Some(tag), ..entry(seq, activity, state) }
}

#[test]
fn a_message_that_was_not_sent_is_looked_for_in_the_own_code_of_the_sender_and_the_rest_is_held_up() {
    // Rank 2 never sends to rank 1, so that rank 1 never sends to rank 0.
    let d = diagnose(&[
        dump(0, vec![message(0, Recv, 1, 7, Started)]),
        dump(1, vec![entry(0, Barrier, Completed), message(0, Recv, 2, 8, Started)]),
        dump(2, vec![entry(0, Barrier, Completed), message(0, Send, 0, 7, Completed)]),
    ]);
    assert_eq!(d.suspects, [2], "{d}");
    let first = &d.findings[0];
    assert!(first.contains("rank 1 waits in recv number 0 from rank 2 with tag 8"), "{d}");
    assert!(first.contains("rank 2 has not sent") && first.contains("in the own code of rank 2"), "{d}");
    let held_up = d.findings.iter().find(|f| f.contains("which rank 1 has not sent")).unwrap();
    assert!(held_up.contains("it is in recv number 0 from rank 2 with tag 8"), "{d}");
}

#[test]
fn a_message_that_was_sent_and_does_not_arrive_is_the_communications() {
    for state in [Started, Completed] {
        let d = diagnose(&[
            dump(0, vec![message(0, Send, 1, 7, state)]),
            dump(1, vec![message(0, Recv, 0, 7, Started)]),
            dump(2, vec![]),
        ]);
        assert_eq!(d.findings.len(), 1, "{d}");
        assert!(d.findings[0].contains("the hang is in the communication"), "{d}");
        assert!(d.suspects.is_empty() && d.hangs);
    }
}

#[test]
fn ranks_that_wait_for_each_other_are_both_named() {
    let d = diagnose(&[
        dump(0, vec![message(0, Recv, 1, 7, Started)]),
        dump(1, vec![message(0, Recv, 0, 7, Started)]),
        dump(2, vec![]),
    ]);
    assert_eq!(d.suspects, [0, 1], "{d}");
    assert!(d.findings[0].contains("which rank 1 has not sent: it is in recv number 0 from rank 0"), "{d}");
}

#[test]
fn a_rank_that_waits_for_a_message_is_not_said_to_hang_in_its_own_code() {
    let d = diagnose(&[
        dump(0, vec![entry(0, AllReduce, Started)]),
        dump(1, vec![message(0, Recv, 2, 7, Started)]),
        dump(2, vec![entry(0, AllReduce, Started)]),
    ]);
    let behind = d.findings.iter().find(|f| f.contains("rank 1 has not called all_reduce number 0")).unwrap();
    assert!(behind.contains("it is in recv number 0 from rank 2 with tag 7"), "{d}");
    assert!(!d.to_string().contains("the rank's own code"), "{d}");
}
