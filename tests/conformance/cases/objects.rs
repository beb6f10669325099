//! Objects of any serde type.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch_distributed::{Error, ProcessGroup};

use super::list;

list! {
    1 any_serde_type_goes_round;
    1 objects_may_be_empty_or_large_and_of_different_sizes;
    2 an_object_of_another_type_is_an_error_and_the_group_goes_on;
    1 each_rank_gets_its_own_object_of_a_scattered_list;
    1 objects_are_gathered_on_one_rank;

    free order:
    2 objects_go_point_to_point_and_from_anybody;
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Report {
    Nothing,
    Loss { step: u64, value: f64, parts: BTreeMap<String, Vec<f32>> },
}

fn report(rank: usize) -> Report {
    let parts = BTreeMap::from([("encoder".to_owned(), vec![rank as f32; 3]), (String::new(), vec![])]);
    if rank == 0 { Report::Nothing } else { Report::Loss { step: rank as u64, value: 0.5, parts } }
}

fn any_serde_type_goes_round(group: &ProcessGroup) {
    let n = group.size();
    let all = group.all_gather_object(&report(group.rank())).unwrap();
    assert_eq!(all, (0..n).map(report).collect::<Vec<_>>());
    for src in 0..n {
        let mine = (group.rank() == src).then(|| report(src));
        assert_eq!(group.broadcast_object(mine, src).unwrap(), report(src));
    }
}

fn objects_may_be_empty_or_large_and_of_different_sizes(group: &ProcessGroup) {
    let object = |rank: usize| vec![rank as u8; if rank.is_multiple_of(2) { 0 } else { 100_000 * rank }];
    let all = group.all_gather_object(&object(group.rank())).unwrap();
    assert!(all.iter().enumerate().all(|(rank, bytes)| *bytes == object(rank)));
    let all = group.all_gather_object(&()).unwrap();
    assert_eq!(all.len(), group.size());
}

fn an_object_of_another_type_is_an_error_and_the_group_goes_on(group: &ProcessGroup) {
    if group.rank() == 0 {
        group.broadcast_object(Some("a text".to_owned()), 0).unwrap();
    } else {
        let error = group.broadcast_object::<(u8, u8)>(None, 0).unwrap_err();
        assert!(matches!(&error, Error::Object { reason } if reason.contains("rank 0")), "{error}");
    }
    group.barrier().unwrap();
}

fn objects_go_point_to_point_and_from_anybody(group: &ProcessGroup) {
    let n = group.size();
    if group.rank() == 0 {
        let mut seen: Vec<usize> = (1..n)
            .map(|_| {
                let (from, object): (usize, Report) = group.recv_object(None, 6).unwrap();
                assert_eq!(object, report(from));
                from
            })
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, (1..n).collect::<Vec<_>>());
    } else {
        group.send_object(&report(group.rank()), 0, 6).unwrap();
    }
}

fn each_rank_gets_its_own_object_of_a_scattered_list(group: &ProcessGroup) {
    let n = group.size();
    for src in 0..n {
        let list = (group.rank() == src).then(|| (0..n).map(|r| "x".repeat(r * 7)).collect::<Vec<_>>());
        assert_eq!(group.scatter_object(list, src).unwrap(), "x".repeat(group.rank() * 7));
    }
}

fn objects_are_gathered_on_one_rank(group: &ProcessGroup) {
    let n = group.size();
    for dst in 0..n {
        let all = group.gather_object(&report(group.rank()), dst).unwrap();
        assert_eq!(all, (group.rank() == dst).then(|| (0..n).map(report).collect()));
    }
}
