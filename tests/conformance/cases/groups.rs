//! Groups made from groups.

use std::time::Duration;

use tch_distributed::{Error, GroupOptions, ProcessGroup, ReduceOp};

use super::{list, numbers, read};

list! {
    1 a_group_of_one_works;
    3 ranks_are_sorted_unless_the_order_is_kept;
    2 ranks_outside_a_group_get_none;
    1 names_are_counted_as_pytorch_counts_them;
    2 rank_arguments_are_ranks_within_the_group;
    2 groups_may_be_used_from_several_threads_at_once;
    1 a_group_outlives_the_group_it_was_made_from;
    2 subgroups_cut_the_group_into_equal_parts;
    3 subgroups_by_enumeration_may_leave_ranks_out;
    2 split_groups_by_colour_in_the_order_of_keys;
    2 ranks_that_disagree_about_a_group_are_told;
    1 a_group_prints_its_name_rank_ranks_and_backend;
    1 timeouts_are_inherited_set_and_overridden_by_handle;
    2 a_destroyed_group_refuses_calls_and_the_world_goes_on;
    1 aborting_a_group_poisons_it_and_no_other;
    2 monitored_barriers_pass_when_all_come;

    free order:
    3 overlapping_groups_may_be_used_in_different_orders;
}

fn sum(group: &ProcessGroup, value: i64) -> i64 {
    let mut t = numbers(&[value]);
    group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
    read(&t)[0]
}

fn a_group_of_one_works(group: &ProcessGroup) {
    for rank in 0..group.size() {
        if let Some(one) = group.new_group(&[rank]).unwrap() {
            assert_eq!((one.rank(), one.size(), one.ranks()), (0, 1, &[rank][..]));
            assert_eq!(sum(&one, 5), 5);
        }
    }
}

fn ranks_are_sorted_unless_the_order_is_kept(group: &ProcessGroup) {
    let sorted = group.new_group(&[2, 0]).unwrap();
    let kept = group.new_group_with(&[2, 0], GroupOptions::new().keep_order(true)).unwrap();
    if let (Some(sorted), Some(kept)) = (sorted, kept) {
        assert_eq!((sorted.ranks(), kept.ranks()), (&[0, 2][..], &[2, 0][..]));
        assert_eq!(kept.group_rank(2), Some(0));
        let all = kept.all_gather_object(&group.rank()).unwrap();
        assert_eq!(all, [2, 0]);
    }
}

fn ranks_outside_a_group_get_none(group: &ProcessGroup) {
    let inner = group.new_group(&[1]).unwrap();
    assert_eq!(inner.is_some(), group.rank() == 1);
    assert_eq!(group.group_rank(group.size()), None);
}

fn names_are_counted_as_pytorch_counts_them(group: &ProcessGroup) {
    let last = group.size() - 1;
    for number in 1..4 {
        if let Some(one) = group.new_group(&[last]).unwrap() {
            // Below the default group they are PyTorch's; below others they say where they come from.
            let expected =
                if group.name() == "0" { number.to_string() } else { format!("{}.{number}", group.name()) };
            assert_eq!(one.name(), expected, "counted on members and others alike");
        }
    }
    let named = group.new_group_with(&[0], GroupOptions::new().group_name("trainers")).unwrap();
    assert_eq!(named.map(|g| g.name().to_owned()), (group.rank() == 0).then(|| "trainers".to_owned()));
}

fn rank_arguments_are_ranks_within_the_group(group: &ProcessGroup) {
    let ranks: Vec<usize> = (1..group.size()).collect();
    let Some(inner) = group.new_group(&ranks).unwrap() else { return };
    let mut t = numbers(&[group.rank() as i64]);
    inner.broadcast(&mut t, 0).unwrap();
    assert_eq!(read(&t), [1], "rank 0 of the group is rank 1 of the world");
    assert!(matches!(inner.broadcast(&mut t, ranks.len()), Err(Error::RankOutOfRange { .. })));
    if let Some(innermost) = inner.new_group(&[0]).unwrap() {
        assert_eq!(innermost.ranks(), [1], "ranks() are global");
    }
}

fn overlapping_groups_may_be_used_in_different_orders(group: &ProcessGroup) {
    // Three pairs in a ring: each rank of 0..3 is in two of them, and uses its own first.
    let pairs: Vec<_> = (0..3).map(|i| group.new_group(&[i, (i + 1) % 3]).unwrap()).collect();
    let me = group.rank();
    let works: Vec<_> = (0..3)
        .map(|i| (me + i) % 3)
        .filter_map(|i| pairs[i].as_ref().map(|pair| (pair, numbers(&[1]))))
        .map(|(pair, t)| (pair.all_reduce_async(&t, ReduceOp::Sum).unwrap(), t))
        .collect();
    for (work, t) in works {
        work.wait().unwrap();
        assert_eq!(read(&t), [2]);
    }
}

fn groups_may_be_used_from_several_threads_at_once(group: &ProcessGroup) {
    let all: Vec<usize> = (0..group.size()).collect();
    let every_second: Vec<usize> = all.iter().copied().step_by(2).collect();
    let members = [&all, &all, &every_second, &all[1..].to_vec(), &all[..1].to_vec()];
    // They overlap: each rank is in several.
    let groups: Vec<_> = members.iter().filter_map(|ranks| group.new_group(ranks).unwrap()).collect();
    std::thread::scope(|scope| {
        for (i, own) in groups.iter().enumerate() {
            scope.spawn(move || {
                for turn in 0..20 {
                    let x = turn + i as i64;
                    let total = own.all_gather_object(&x).unwrap().iter().sum::<i64>();
                    assert_eq!(sum(own, x), total);
                }
            });
        }
    });
}

fn a_group_outlives_the_group_it_was_made_from(group: &ProcessGroup) {
    let all: Vec<usize> = (0..group.size()).collect();
    for destroyed in [false, true] {
        let parent = group.new_group(&all).unwrap().unwrap();
        let child = parent.new_group(&all).unwrap().unwrap();
        if destroyed {
            parent.destroy().unwrap();
        }
        drop(parent);
        let grandchild = child.new_group(&all).unwrap().unwrap();
        assert_eq!(sum(&child, 1) + sum(&grandchild, 2), 3 * group.size() as i64);
    }
}

fn subgroups_cut_the_group_into_equal_parts(group: &ProcessGroup) {
    let n = group.size();
    let (whole, all) = group.new_subgroups(n).unwrap();
    assert_eq!((whole.size(), all.len()), (n, 1));
    for wrong in [0, n + 1] {
        assert!(matches!(
            group.new_subgroups(wrong),
            Err(Error::InvalidArgument { argument: "group_size", .. })
        ));
    }
    let (one, all) = group.new_subgroups(1).unwrap();
    assert_eq!((sum(&one, 3), all.len()), (3, n));
}

fn subgroups_by_enumeration_may_leave_ranks_out(group: &ProcessGroup) {
    let mine = group.new_subgroups_by_enumeration(&[vec![2], vec![0]]).unwrap();
    assert_eq!(mine.is_some(), group.rank() == 0 || group.rank() == 2);
    for wrong in [&[vec![0], vec![0, 1]][..], &[], &[vec![]]] {
        let error = group.new_subgroups_by_enumeration(wrong).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { argument: "ranks_per_group", .. }), "{error}");
    }
}

fn split_groups_by_colour_in_the_order_of_keys(group: &ProcessGroup) {
    let (me, n) = (group.rank(), group.size());
    let part = group.split((me > 0).then_some(me as i64 % 2), -(me as i64)).unwrap();
    assert_eq!(part.is_none(), me == 0);
    if let Some(part) = part {
        let expected: Vec<usize> = (1..n).rev().filter(|r| r % 2 == me % 2).collect();
        assert_eq!(part.ranks(), expected);
        assert_eq!(sum(&part, 1), expected.len() as i64);
    }
    let same = group.split(Some(-5), 0).unwrap().unwrap();
    assert_eq!(same.ranks(), (0..n).collect::<Vec<_>>(), "equal keys keep the order of ranks");
}

fn ranks_that_disagree_about_a_group_are_told(group: &ProcessGroup) {
    // Rank 0 and rank 1 make different groups in the same turn: at least the second to come is told.
    let options = || GroupOptions::new().timeout(Duration::from_millis(500));
    let ranks: Vec<usize> = if group.rank() == 0 { vec![0] } else { (0..group.size()).collect() };
    let outcome = group.new_group_with(&ranks, options());
    let told = match &outcome {
        Err(Error::InvalidArgument { argument: "ranks" | "world_size", reason }) => {
            reason.contains("disagree")
        }
        _ => false,
    };
    let told = group.all_gather_object(&told).unwrap();
    assert!(told.contains(&true), "nobody was told: {outcome:?}");
}

fn a_group_prints_its_name_rank_ranks_and_backend(group: &ProcessGroup) {
    let (debug, display) = (format!("{group:?}"), group.to_string());
    for text in [debug, display] {
        assert!(text.starts_with("ProcessGroup"), "{text}");
        assert!(
            text.contains(&group.backend_name()) && text.contains(&format!("{:?}", group.ranks())),
            "{text}"
        );
    }
    assert!(tch_distributed::is_backend_available(&group.backend_name()));
}

fn timeouts_are_inherited_set_and_overridden_by_handle(group: &ProcessGroup) {
    let all: Vec<usize> = (0..group.size()).collect();
    let minute = Duration::from_secs(60);
    let child = group.new_group(&all).unwrap().unwrap();
    assert_eq!(child.timeout(), group.timeout());
    child.set_timeout(minute);
    assert_eq!((child.timeout(), child.clone().timeout()), (minute, minute));
    let short = child.with_timeout(Duration::from_secs(7));
    assert_eq!((short.timeout(), child.timeout()), (Duration::from_secs(7), minute));
    assert_eq!(sum(&short, 1), group.size() as i64, "it is the same group");
    let own = group.new_group_with(&all, GroupOptions::new().timeout(minute)).unwrap().unwrap();
    assert_eq!(own.timeout(), minute);
}

fn a_destroyed_group_refuses_calls_and_the_world_goes_on(group: &ProcessGroup) {
    let all: Vec<usize> = (0..group.size()).collect();
    let child = group.new_group(&all).unwrap().unwrap();
    assert_eq!(sum(&child, 1), group.size() as i64);
    child.destroy().unwrap();
    child.destroy().unwrap();
    let error = child.barrier().unwrap_err();
    assert!(error.to_string().contains("was destroyed"), "{error}");
    assert_eq!(sum(group, 2), 2 * group.size() as i64);
}

fn aborting_a_group_poisons_it_and_no_other(group: &ProcessGroup) {
    let all: Vec<usize> = (0..group.size()).collect();
    let child = group.new_group(&all).unwrap().unwrap();
    child.abort().unwrap();
    child.abort().unwrap();
    match child.barrier().unwrap_err() {
        Error::Poisoned { cause } => assert!(matches!(*cause, Error::Aborted), "{cause:?}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(sum(group, 1), group.size() as i64);
}

fn monitored_barriers_pass_when_all_come(group: &ProcessGroup) {
    for wait_all in [true, false, true] {
        group.monitored_barrier(Duration::from_secs(20), wait_all).unwrap();
    }
}
