//! Full checking (`InitOptions::debug_detail`): every collective is compared before it runs, and a
//! disagreement is the same error on all ranks at once, with shapes and lines.

use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tch_distributed::{Error, InitOptions, ProcessGroup, ReduceOp, testing};

fn world<T: Send>(size: usize, body: impl Fn(ProcessGroup) -> T + Send + Sync) -> Vec<T> {
    let options = InitOptions::new().debug_detail(true).timeout(Duration::from_secs(30));
    testing::run_threads_on("native", options, size, body)
}

fn ones(shape: &[i64]) -> Tensor {
    Tensor::ones(shape, (Kind::Float, Device::Cpu))
}

#[test]
fn shapes_of_equal_counts_that_differ_are_told_on_every_rank_with_the_lines() {
    let texts = world(3, |group| {
        let mut t = if group.rank() == 1 { ones(&[3, 2]) } else { ones(&[2, 3]) };
        match group.all_reduce(&mut t, ReduceOp::Sum).unwrap_err() {
            Error::Desync { rank, theirs, ours, .. } => {
                assert_eq!(rank, if group.rank() == 1 { 0 } else { 1 });
                assert!(theirs.contains(file!()) && ours.contains(file!()), "{theirs} / {ours}");
                format!("{theirs} / {ours}")
            }
            other => panic!("{other:?}"),
        }
    });
    assert!(texts[0].contains("[3, 2]") && texts[0].contains("[2, 3]"), "{}", texts[0]);
    assert_eq!(texts[0], texts[2], "ranks that agree say the same");
}

#[test]
fn a_disagreement_touches_no_tensor() {
    world(2, |group| {
        let mut t = ones(&[4]);
        let op = if group.rank() == 0 { ReduceOp::Sum } else { ReduceOp::Max };
        assert!(matches!(group.all_reduce(&mut t, op), Err(Error::Desync { .. })));
        assert_eq!(Vec::<f32>::try_from(t).unwrap(), [1.0; 4]);
        assert!(matches!(group.barrier(), Err(Error::Poisoned { .. })));
    });
}

#[test]
fn different_operations_are_told_before_either_runs() {
    world(2, |group| {
        let error = if group.rank() == 0 {
            group.barrier().unwrap_err()
        } else {
            group.broadcast_async(&ones(&[2]), 0).unwrap_err()
        };
        let text = error.to_string();
        assert!(text.contains("barrier") && text.contains("broadcast(root 0) of Float [2]"), "{text}");
    });
}

#[test]
fn programs_that_agree_run_as_ever_also_where_shapes_may_differ() {
    world(3, |group| {
        let n = group.rank() as i64 + 1;
        let all = group.all_gather_uneven(&ones(&[n, 2])).unwrap();
        assert_eq!(all.iter().map(|t| t.size()[0]).collect::<Vec<_>>(), [1, 2, 3]);
        // The lines differ, the calls do not.
        let by_another_line = || group.barrier().unwrap();
        if group.rank() == 0 {
            group.barrier().unwrap()
        } else {
            by_another_line()
        }
        assert_eq!(group.all_gather_object(&n).unwrap(), [1, 2, 3]);
        let pair = group.new_group(&[0, 1]).unwrap();
        if let Some(pair) = pair {
            let error = pair.broadcast(&mut ones(&[1]), pair.rank()).unwrap_err();
            assert!(error.to_string().contains("root"), "groups inherit the checking: {error}");
        }
    });
}

#[test]
fn factors_are_each_ranks_own() {
    world(2, |group| {
        let rank = group.rank();
        let mut t = ones(&[3]);
        group.all_reduce(&mut t, ReduceOp::PremulSum(rank as f64 + 1.0)).unwrap();
        assert_eq!(t, ones(&[3]) * 3);
        // Rank 0 gives one factor twice, rank 1 gives two: they make as many calls all the same.
        let (a, b) = (ones(&[2]), ones(&[2]));
        let mut batch = group.coalescing();
        batch.all_reduce(&a, ReduceOp::PremulSum(1.0)).unwrap();
        batch.all_reduce(&b, ReduceOp::PremulSum(1.0 + rank as f64)).unwrap();
        batch.launch().unwrap().wait().unwrap();
        assert_eq!((a, b), (ones(&[2]) * 2, ones(&[2]) * 3));
        // What ranks disagree about shows the factor.
        let mut t = if rank == 0 { ones(&[2]) } else { ones(&[1, 2]) };
        let error = group.all_reduce(&mut t, ReduceOp::PremulSum(rank as f64 + 0.5)).unwrap_err();
        let Error::Desync { seq: 4, theirs, ours, .. } = error else { panic!("{error}") };
        for (text, rank) in [(theirs, 1 - rank), (ours, rank)] {
            assert!(text.contains(&format!("its factor {rank}.5")), "{text}");
        }
    });
}

#[test]
fn ranks_must_agree_on_checking_itself() {
    let store = std::sync::Arc::new(tch_distributed::store::HashStore::new());
    let both = std::sync::Barrier::new(2);
    let errors: Vec<Option<String>> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..2)
            .map(|rank| {
                let (store, both) = (store.clone(), &both);
                scope.spawn(move || {
                    testing::run_threads(1, |own| {
                        own.destroy().unwrap();
                        tch_distributed::destroy_process_group().unwrap();
                        let options = InitOptions::new()
                            .store(store.clone())
                            .rank(rank)
                            .world_size(2)
                            .timeout(Duration::from_secs(5))
                            .debug_detail(rank == 0);
                        both.wait();
                        tch_distributed::init_process_group("native", options).err().map(|e| e.to_string())
                    })
                    .remove(0)
                })
            })
            .collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    });
    assert!(
        errors.iter().flatten().any(|text| text.contains("debug_detail") && text.contains("disagree")),
        "{errors:?}"
    );
}
