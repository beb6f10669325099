//! What is refused: before a byte moves, with an error that names the argument, and without harm.

use tch::{Device, Kind, Tensor};
use tch_distributed::{Error, ProcessGroup, ReduceOp};

use super::{list, numbers, read, room};

list! {
    1 a_rank_out_of_range_is_refused_by_name;
    2 a_list_of_the_wrong_length_is_refused;
    2 a_list_is_given_on_the_root_and_only_there;
    2 shapes_that_do_not_fit_are_refused_with_both_shapes;
    2 kinds_that_do_not_fit_are_refused_with_both_kinds;
    2 splits_must_be_one_per_rank_not_negative_and_sum_up;
    3 splits_that_wrap_round_to_the_right_sum_are_refused;
    2 an_input_that_does_not_divide_by_the_ranks_is_refused;
    1 outputs_that_overlap_are_refused;
    1 an_undefined_or_sparse_tensor_is_refused;
    1 sending_to_or_receiving_from_oneself_and_waiting_is_refused;
    2 an_operation_that_means_nothing_names_itself_and_the_kind;
    2 a_refused_call_consumes_nothing_and_may_be_repeated;
    2 a_refused_batch_starts_none_of_its_messages;
}

fn invalid(error: Error, name: &str) -> String {
    match error {
        Error::InvalidArgument { argument, reason } if argument == name => reason,
        other => panic!("expected InvalidArgument for {name}, got {other:?}"),
    }
}

fn a_rank_out_of_range_is_refused_by_name(group: &ProcessGroup) {
    let n = group.size();
    let mut t = numbers(&[1]);
    let errors = [
        group.broadcast(&mut t, n).unwrap_err(),
        group.reduce(&mut t, n, ReduceOp::Sum).unwrap_err(),
        group.gather(None, &numbers(&[1]), n).unwrap_err(),
        group.scatter(&mut t, None, n).unwrap_err(),
        group.send(&numbers(&[1]), n, 0).unwrap_err(),
        group.recv(&mut t, n, 0).unwrap_err(),
        group.isend(&numbers(&[1]), n, 0).unwrap_err(),
        group.irecv(&numbers(&[1]), n, 0).unwrap_err(),
        group.broadcast_object(Some(1), n).unwrap_err(),
        group.gather_object(&1, n).unwrap_err(),
        group.scatter_object(Some(vec![1]), n).unwrap_err(),
        group.send_object(&1, n, 0).unwrap_err(),
        group.new_group(&[n]).unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, Error::RankOutOfRange { rank, size } if rank == n && size == n), "{error:?}");
        assert!(error.to_string().contains(&format!("rank {n} is out of range")), "{error}");
    }
}

fn a_list_of_the_wrong_length_is_refused(group: &ProcessGroup) {
    let n = group.size();
    let mut short: Vec<Tensor> = (1..n).map(|_| room(1)).collect();
    let full: Vec<Tensor> = (0..n).map(|_| room(1)).collect();
    let input = numbers(&[1]);
    let mut out = room(1);
    let wanted = format!("one tensor for each of the {n} ranks is expected, got {}", n - 1);
    assert_eq!(invalid(group.all_gather(&mut short, &input).unwrap_err(), "outputs"), wanted);
    assert_eq!(invalid(group.all_to_all(&mut short, &full).unwrap_err(), "outputs"), wanted);
    let inputs: Vec<Tensor> = short.iter().map(Tensor::shallow_clone).collect();
    assert_eq!(
        invalid(group.reduce_scatter(&mut out, &inputs, ReduceOp::Sum).unwrap_err(), "inputs"),
        wanted
    );
    assert_eq!(invalid(group.scatter(&mut out, Some(&inputs), group.rank()).unwrap_err(), "inputs"), wanted);
    assert_eq!(invalid(group.gather(Some(&mut short), &input, group.rank()).unwrap_err(), "outputs"), wanted);
    invalid(group.scatter_object(Some(vec![1; n + 1]), group.rank()).unwrap_err(), "objects");
}

fn a_list_is_given_on_the_root_and_only_there(group: &ProcessGroup) {
    let n = group.size();
    let (me, other) = (group.rank(), (group.rank() + 1) % n);
    let mut list: Vec<Tensor> = (0..n).map(|_| room(1)).collect();
    let mut out = room(1);
    assert!(
        invalid(group.gather(None, &room(1), me).unwrap_err(), "outputs")
            .contains("needed on the destination")
    );
    assert!(
        invalid(group.gather(Some(&mut list), &room(1), other).unwrap_err(), "outputs")
            .contains("must be None")
    );
    assert!(
        invalid(group.scatter(&mut out, None, me).unwrap_err(), "inputs").contains("needed on the source")
    );
    assert!(
        invalid(group.scatter(&mut out, Some(&list), other).unwrap_err(), "inputs").contains("must be None")
    );
    invalid(group.broadcast_object::<u8>(None, me).unwrap_err(), "object");
    invalid(group.scatter_object::<u8>(None, me).unwrap_err(), "objects");
}

fn shapes_that_do_not_fit_are_refused_with_both_shapes(group: &ProcessGroup) {
    let n = group.size() as i64;
    let shape = |error: Error, name: &str| match error {
        Error::ShapeMismatch { argument, expected, got } if argument == name => (expected, got),
        other => panic!("expected ShapeMismatch for {name}, got {other:?}"),
    };
    let (_, got) = shape(group.all_gather_into_tensor(&mut room(n * 2 + n), &room(2)).unwrap_err(), "output");
    assert_eq!(got, format!("[{}]", 3 * n));
    let mut outputs: Vec<Tensor> = (0..n).map(|_| room(3)).collect();
    let (expected, got) = shape(group.all_gather(&mut outputs, &room(2)).unwrap_err(), "outputs");
    assert!(expected.contains("[2]") && got == "[3]", "{expected} {got}");
    let inputs: Vec<Tensor> = (0..n).map(|_| room(3)).collect();
    shape(group.reduce_scatter(&mut room(2), &inputs, ReduceOp::Sum).unwrap_err(), "output");
    shape(group.scatter(&mut room(2), Some(&inputs), group.rank()).unwrap_err(), "output");
    shape(group.gather(Some(&mut outputs), &room(2), group.rank()).unwrap_err(), "outputs");
    let wide = Tensor::zeros([n, 2], (Kind::Int64, Device::Cpu));
    shape(group.all_to_all_single(&mut room(n), &wide, None, None).unwrap_err(), "output");
    let scalar = numbers(&[1]).squeeze();
    shape(group.all_to_all_single(&mut scalar.copy(), &scalar, None, None).unwrap_err(), "output");
}

fn kinds_that_do_not_fit_are_refused_with_both_kinds(group: &ProcessGroup) {
    let n = group.size() as i64;
    let float = |n: i64| Tensor::zeros([n], (Kind::Float, Device::Cpu));
    let kinds = |error: Error| match error {
        Error::KindMismatch { expected, got, .. } => {
            assert!(
                expected.contains("Int64") && got == "Float" || expected.contains("Float") && got == "Int64",
                "{expected} {got}"
            );
        }
        other => panic!("expected KindMismatch, got {other:?}"),
    };
    kinds(group.all_gather_into_tensor(&mut float(n), &room(1)).unwrap_err());
    kinds(group.reduce_scatter_tensor(&mut float(1), &room(n), ReduceOp::Sum).unwrap_err());
    kinds(group.all_to_all_single(&mut float(n), &room(n), None, None).unwrap_err());
    let mixed: Vec<Tensor> = (0..n).map(|r| if r == 0 { float(1) } else { room(1) }).collect();
    kinds(group.reduce_scatter(&mut room(1), &mixed, ReduceOp::Sum).unwrap_err());
    kinds(group.all_gather(&mut mixed.iter().map(Tensor::copy).collect::<Vec<_>>(), &room(1)).unwrap_err());
}

fn splits_must_be_one_per_rank_not_negative_and_sum_up(group: &ProcessGroup) {
    let n = group.size();
    let rows = 2 * n as i64;
    let splits = |f: fn(usize) -> i64| (0..n).map(f).collect::<Vec<i64>>();
    let even = splits(|_| 2);
    let mut out = room(rows);
    let mut call = |output: &[i64], input: &[i64]| {
        group.all_to_all_single(&mut out, &room(rows), Some(output), Some(input)).unwrap_err()
    };
    assert!(invalid(call(&even, &even[1..]), "input_splits").contains("one split for each"));
    assert!(invalid(call(&even[1..], &even), "output_splits").contains("one split for each"));
    assert!(invalid(call(&even, &splits(|_| 1)), "input_splits").contains(&format!("is {rows}")));
    let negative = splits(|r| {
        if r == 0 {
            -1
        } else if r == 1 {
            5
        } else {
            2
        }
    });
    assert!(invalid(call(&even, &negative), "input_splits").contains("negative"));
}

fn splits_that_wrap_round_to_the_right_sum_are_refused(group: &ProcessGroup) {
    let n = group.size();
    let rows = 2 * n as i64;
    let even = vec![2; n];
    let mut huge = vec![0; n];
    huge[..3].copy_from_slice(&[i64::MAX, i64::MAX, rows + 2]);
    assert_eq!(huge.iter().fold(0i64, |sum, &split| sum.wrapping_add(split)), rows);
    let mut out = room(rows);
    for (output, input, argument) in [(&even, &huge, "input_splits"), (&huge, &even, "output_splits")] {
        let refused = group.all_to_all_single(&mut out, &room(rows), Some(output), Some(input));
        assert!(invalid(refused.unwrap_err(), argument).contains("sum to more than"));
    }
    assert!(out.equal(&room(rows)), "nothing was written");
}

fn an_input_that_does_not_divide_by_the_ranks_is_refused(group: &ProcessGroup) {
    let n = group.size() as i64;
    let errors = [
        group.reduce_scatter_tensor(&mut room(1), &room(n + 1), ReduceOp::Sum).unwrap_err(),
        group.all_to_all_single(&mut room(n), &room(n + 1), None, None).unwrap_err(),
    ];
    for error in errors {
        let text = error.to_string();
        assert!(matches!(error, Error::ShapeMismatch { argument: "input", .. }), "{error:?}");
        assert!(text.contains("divisible") && text.contains(&format!("[{}]", n + 1)), "{text}");
    }
}

fn outputs_that_overlap_are_refused(group: &ProcessGroup) {
    let n = group.size() as i64;
    let mut repeated = numbers(&[1]).expand([4], false);
    invalid(group.all_reduce(&mut repeated, ReduceOp::Sum).unwrap_err(), "tensor");
    invalid(
        group
            .all_gather_into_tensor(&mut numbers(&[1]).expand([n * 2], false), &room(2))
            .unwrap_err_or_world_of_one(),
        "output",
    );
    let base = room(4);
    let mut windows: Vec<Tensor> = vec![base.narrow(0, 0, 3), base.narrow(0, 1, 3)];
    invalid(group.all_reduce_coalesced(&mut windows, ReduceOp::Sum).unwrap_err(), "tensors");
    // Views that interleave share no element: they are accepted.
    let grid = Tensor::ones([4, 2], (Kind::Int64, Device::Cpu));
    let mut columns = vec![grid.select(1, 0), grid.select(1, 1)];
    group.all_reduce_coalesced(&mut columns, ReduceOp::Sum).unwrap();
    assert_eq!(read(&grid), vec![n; 8]);
}

trait OrWorldOfOne {
    fn unwrap_err_or_world_of_one(self) -> Error;
}

impl OrWorldOfOne for tch_distributed::Result<()> {
    fn unwrap_err_or_world_of_one(self) -> Error {
        self.expect_err("an output that repeats one element cannot take two")
    }
}

fn an_undefined_or_sparse_tensor_is_refused(group: &ProcessGroup) {
    let mut sparse =
        Tensor::ones([2, 2], (Kind::Float, Device::Cpu)).to_sparse(None::<tch::Layout>, None::<i64>, None);
    invalid(group.all_reduce(&mut Tensor::new(), ReduceOp::Sum).unwrap_err(), "tensor");
    assert!(invalid(group.broadcast(&mut sparse, 0).unwrap_err(), "tensor").contains("dense"));
}

fn sending_to_or_receiving_from_oneself_and_waiting_is_refused(group: &ProcessGroup) {
    let me = group.rank();
    invalid(group.send(&numbers(&[1]), me, 0).unwrap_err(), "dst");
    invalid(group.recv(&mut room(1), me, 0).unwrap_err(), "src");
}

fn an_operation_that_means_nothing_names_itself_and_the_kind(group: &ProcessGroup) {
    let mut float = Tensor::ones([2], (Kind::Float, Device::Cpu));
    let error = group.all_reduce(&mut float, ReduceOp::BitXor).unwrap_err();
    assert!(
        matches!(&error, Error::Unsupported { what, .. } if what.contains("BitXor") && what.contains("Float")),
        "{error}"
    );
    let error = group.reduce(&mut numbers(&[1]), 0, ReduceOp::PremulSum(2.0)).unwrap_err();
    assert!(error.to_string().contains("PremulSum(2.0) on Int64"), "{error}");
}

fn a_refused_call_consumes_nothing_and_may_be_repeated(group: &ProcessGroup) {
    let n = group.size() as i64;
    // Only rank 0 makes mistakes: were one of them counted, the ranks would no longer agree.
    if group.rank() == 0 {
        for _ in 0..3 {
            group.broadcast(&mut room(1), 99).unwrap_err();
            group.all_gather_into_tensor(&mut room(1), &room(7)).unwrap_err();
            let mut float = Tensor::ones([2], (Kind::Float, Device::Cpu));
            group.all_reduce(&mut float, ReduceOp::BitOr).unwrap_err();
            group.new_group(&[0, 0]).unwrap_err();
            group.new_group(&[]).unwrap_err();
        }
    }
    let mut t = numbers(&[1]);
    group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
    assert_eq!(read(&t), [n]);
    let pair = group.new_group(&[0, 1]).unwrap();
    if let Some(pair) = pair {
        pair.all_reduce(&mut t, ReduceOp::Sum).unwrap();
        assert_eq!(read(&t), [2 * n]);
    }
}

fn a_refused_batch_starts_none_of_its_messages(group: &ProcessGroup) {
    use tch_distributed::P2pOp;
    let (me, n) = (group.rank(), group.size());
    let ghost = numbers(&[-1]);
    group
        .batch_isend_irecv(vec![P2pOp::send(&ghost, (me + 1) % n, 9), P2pOp::send(&ghost, n, 9)])
        .unwrap_err();
    assert!(group.batch_isend_irecv(Vec::new()).unwrap().is_empty());
    let (mine, got) = (numbers(&[me as i64]), room(1));
    let ops = vec![P2pOp::send(&mine, (me + 1) % n, 9), P2pOp::recv(&got, (me + n - 1) % n, 9)];
    group.batch_isend_irecv(ops).unwrap().iter().for_each(|work| work.wait().unwrap());
    assert_eq!(read(&got), [((me + n - 1) % n) as i64]);
}
