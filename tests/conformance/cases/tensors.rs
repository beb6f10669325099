//! Tensors of every shape of memory.

use tch::{Device, Kind, Tensor};
use tch_distributed::{ProcessGroup, ReduceOp};

use super::{list, numbers, read, room};
use crate::model::KINDS;

list! {
    1 a_tensor_without_dimensions_works;
    2 a_tensor_without_elements_is_a_call_all_the_same;
    1 a_leaf_that_requires_gradient_is_written_as_under_no_grad;
    1 a_conjugated_view_is_sent_as_it_reads;
    2 a_view_is_filled_and_its_surroundings_are_not_touched;
    1 channels_last_memory_means_the_same_elements_as_any_other;
    2 ranks_may_lay_out_the_same_shape_differently;
    1 an_input_may_be_its_own_part_of_the_gathered_output;
    2 inputs_that_share_memory_with_outputs_are_read_before_they_are_written;
    1 an_input_that_shares_memory_with_the_output_of_another_pair_is_read_first;
    1 every_kind_can_be_moved;
    1 a_world_of_one_copies_what_it_would_receive;
    2 outputs_are_filled_in_place_and_never_replaced;
}

fn a_tensor_without_dimensions_works(group: &ProcessGroup) {
    let n = group.size() as i64;
    let mut t = Tensor::from(2i64);
    group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
    assert_eq!((t.size(), t.int64_value(&[])), (vec![], 2 * n));
    let mut all = room(n);
    group.all_gather_into_tensor(&mut all, &Tensor::from(group.rank() as i64)).unwrap();
    assert_eq!(read(&all), (0..n).collect::<Vec<_>>());
    let mut mine = Tensor::from(0i64);
    group.reduce_scatter_tensor(&mut mine, &all, ReduceOp::Sum).unwrap();
    assert_eq!(mine.int64_value(&[]), group.rank() as i64 * n);
}

fn a_tensor_without_elements_is_a_call_all_the_same(group: &ProcessGroup) {
    let n = group.size();
    let empty = || Tensor::zeros([0, 5], (Kind::Float, Device::Cpu));
    group.all_reduce(&mut empty(), ReduceOp::Sum).unwrap();
    group.broadcast(&mut empty(), n - 1).unwrap();
    group.all_gather_into_tensor(&mut empty(), &empty()).unwrap();
    group.all_to_all_single(&mut empty(), &empty(), None, None).unwrap();
    let mut t = numbers(&[1]);
    group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
    assert_eq!(read(&t), [n as i64], "the calls are still in step");
}

fn a_leaf_that_requires_gradient_is_written_as_under_no_grad(group: &ProcessGroup) {
    let n = group.size() as f64;
    for leaf in [
        Tensor::ones([4], (Kind::Float, Device::Cpu)),
        Tensor::ones([4, 2], (Kind::Float, Device::Cpu)).select(1, 1).copy(),
    ] {
        let mut leaf = leaf.set_requires_grad(true);
        group.all_reduce(&mut leaf, ReduceOp::Sum).unwrap();
        assert!(leaf.requires_grad() && leaf.is_leaf());
        assert_eq!(leaf.double_value(&[3]), n);
        let loss = leaf.sum(Kind::Float);
        loss.backward();
        assert_eq!(leaf.grad().double_value(&[0]), 1.0);
    }
    let transposed = Tensor::ones([2, 3], (Kind::Float, Device::Cpu)).transpose(0, 1).set_requires_grad(true);
    group.all_reduce_async(&transposed, ReduceOp::Sum).unwrap().wait().unwrap();
    assert_eq!(transposed.double_value(&[2, 1]), n);
}

fn a_conjugated_view_is_sent_as_it_reads(group: &ProcessGroup) {
    let n = group.size() as f64;
    let real = Tensor::from_slice(&[1.0f64, 2.0]);
    let z = Tensor::complex(&real, &real);
    let mut conjugated = z.conj();
    group.all_reduce(&mut conjugated, ReduceOp::Sum).unwrap();
    let imaginary = conjugated.resolve_conj().view_as_real().select(1, 1);
    assert_eq!(Vec::<f64>::try_from(imaginary).unwrap(), [-n, -2.0 * n]);
}

fn a_view_is_filled_and_its_surroundings_are_not_touched(group: &ProcessGroup) {
    let n = group.size() as i64;
    let base = Tensor::full([4, 4], 7, (Kind::Int64, Device::Cpu));
    let mut column = base.select(1, 2);
    let _ = column.fill_(group.rank() as i64);
    group.all_reduce(&mut column, ReduceOp::Sum).unwrap();
    let sum = n * (n - 1) / 2;
    assert_eq!(read(&base), [7, 7, sum, 7].repeat(4));
}

fn channels_last_memory_means_the_same_elements_as_any_other(group: &ProcessGroup) {
    let n = group.size() as i64;
    let plain = Tensor::arange(24, (Kind::Int64, Device::Cpu)).view([1, 2, 3, 4]);
    // Memory in the order of rank 0's plain tensor, or with the channels last.
    let mut t = if group.rank().is_multiple_of(2) {
        plain.copy()
    } else {
        plain.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
    };
    group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
    assert_eq!(read(&t), read(&(plain * n)));
}

fn ranks_may_lay_out_the_same_shape_differently(group: &ProcessGroup) {
    let mut t = if group.rank() == 0 {
        Tensor::arange(6, (Kind::Int64, Device::Cpu)).view([3, 2])
    } else {
        Tensor::zeros([2, 3], (Kind::Int64, Device::Cpu)).transpose(0, 1)
    };
    group.broadcast(&mut t, 0).unwrap();
    assert_eq!(read(&t), [0, 1, 2, 3, 4, 5]);
}

fn an_input_may_be_its_own_part_of_the_gathered_output(group: &ProcessGroup) {
    let (me, n) = (group.rank() as i64, group.size() as i64);
    let mut all = room(2 * n);
    let mine = all.narrow(0, 2 * me, 2);
    let _ = mine.shallow_clone().fill_(me + 1);
    group.all_gather_into_tensor(&mut all, &mine).unwrap();
    assert_eq!(read(&all), (0..2 * n).map(|i| i / 2 + 1).collect::<Vec<_>>());
    let mut list: Vec<Tensor> = (0..n).map(|_| room(1)).collect();
    let _ = list[me as usize].fill_(me);
    let mine = list[me as usize].shallow_clone();
    group.all_gather(&mut list, &mine).unwrap();
    assert_eq!(list.iter().flat_map(read).collect::<Vec<_>>(), (0..n).collect::<Vec<_>>());
}

fn inputs_that_share_memory_with_outputs_are_read_before_they_are_written(group: &ProcessGroup) {
    let (me, n) = (group.rank() as i64, group.size() as i64);
    // All-to-all in place.
    let mut t = Tensor::arange(n, (Kind::Int64, Device::Cpu)) + 10 * me;
    let input = t.shallow_clone();
    group.all_to_all_single(&mut t, &input, None, None).unwrap();
    assert_eq!(read(&t), (0..n).map(|from| 10 * from + me).collect::<Vec<_>>());
    // Reduce-scatter into its own input.
    let whole = Tensor::arange(n, (Kind::Int64, Device::Cpu));
    let mut part = whole.narrow(0, 0, 1);
    group.reduce_scatter_tensor(&mut part, &whole, ReduceOp::Sum).unwrap();
    assert_eq!(read(&part), [n * me]);
    // Gathering into a tensor that holds the input elsewhere than at its own part.
    let mut all = Tensor::arange(n, (Kind::Int64, Device::Cpu)) + 100 * me;
    let first = all.narrow(0, 0, 1);
    group.all_gather_into_tensor(&mut all, &first).unwrap();
    assert_eq!(read(&all), (0..n).map(|from| 100 * from).collect::<Vec<_>>());
}

fn an_input_that_shares_memory_with_the_output_of_another_pair_is_read_first(group: &ProcessGroup) {
    const LEN: i64 = 50_000;
    let (me, n) = (group.rank() as i64, group.size() as i64);
    // Part r of each input is filled with r, or 10 + r. One pair's output is part 0 of the other's input.
    let first = Tensor::arange(n, (Kind::Int64, Device::Cpu)).repeat_interleave_self_int(LEN, None, None);
    let second = &first + 10;
    let mut outputs = [second.narrow(0, 0, LEN), room(LEN)];
    group.reduce_scatter_tensor_coalesced(&mut outputs, &[first, second], ReduceOp::Sum).unwrap();
    for (output, expected) in outputs.iter().zip([n * me, n * (10 + me)]) {
        assert!(output.equal(&output.full_like(expected)), "rank {me} expects {expected}");
    }
    // Gathering two in place, and a third whose input is the first's output.
    let mut all = [0, 100, 200].map(|base| room(n) + base);
    for (base, all) in [0, 100].into_iter().zip(&all) {
        let _ = all.narrow(0, me, 1).fill_(base + me);
    }
    let inputs = [all[0].narrow(0, me, 1), all[1].narrow(0, me, 1), all[0].narrow(0, me, 1)];
    group.all_gather_into_tensor_coalesced(&mut all, &inputs).unwrap();
    for (base, all) in [0, 100, 0].into_iter().zip(&all) {
        assert_eq!(read(all), (base..base + n).collect::<Vec<_>>());
    }
}

fn every_kind_can_be_moved(group: &ProcessGroup) {
    let n = group.size() as i64;
    let moved_only = [Kind::ComplexHalf, Kind::Float8e5m2, Kind::Float8e4m3fn];
    for kind in KINDS.into_iter().chain(moved_only) {
        // Zeros elsewhere: tch cannot compute on every kind, but every kind can be compared as bytes.
        let bytes = |t: &Tensor| Vec::<u8>::try_from(t.view_dtype(Kind::Uint8).view([-1])).unwrap();
        let source = Tensor::from_slice(&[1u8; 16]).view_dtype(kind);
        let mut t = if group.rank() == 0 { source.copy() } else { source.zeros_like() };
        group.broadcast(&mut t, 0).unwrap();
        assert_eq!(bytes(&t), [1; 16], "{kind:?}");
        let whole: Vec<i64> = vec![n * source.size()[0]];
        let mut all = Tensor::zeros(&whole[..], (kind, Device::Cpu));
        group.all_gather_into_tensor(&mut all, &source).unwrap();
        assert_eq!(bytes(&all), vec![1; 16 * n as usize], "{kind:?}");
    }
}

fn a_world_of_one_copies_what_it_would_receive(group: &ProcessGroup) {
    let one = group.new_group(&[0]).unwrap();
    let Some(one) = one else { return };
    let (input, mut output) = (numbers(&[1, 2]), room(2));
    one.all_gather_into_tensor(&mut output, &input).unwrap();
    assert_eq!(read(&output), [1, 2]);
    one.reduce_scatter_tensor(&mut output, &numbers(&[3, 4]), ReduceOp::Avg).unwrap();
    assert_eq!(read(&output), [3, 4]);
    one.all_to_all_single(&mut output, &numbers(&[5, 6]), None, None).unwrap();
    assert_eq!(read(&output), [5, 6]);
    one.scatter(&mut output, Some(&[numbers(&[7, 8])]), 0).unwrap();
    assert_eq!(read(&output), [7, 8]);
    let mut list = [room(2)];
    one.gather(Some(&mut list), &numbers(&[9, 9]), 0).unwrap();
    assert_eq!(read(&list[0]), [9, 9]);
    one.all_reduce(&mut output, ReduceOp::Product).unwrap();
    one.barrier().unwrap();
    assert_eq!(read(&output), [7, 8]);
    let mut float = Tensor::from_slice(&[2.0f32]);
    one.all_reduce(&mut float, ReduceOp::PremulSum(0.25)).unwrap();
    assert_eq!(float.double_value(&[0]), 0.5);
}

fn outputs_are_filled_in_place_and_never_replaced(group: &ProcessGroup) {
    let n = group.size() as i64;
    let mut t = numbers(&[1, 1]);
    let before = t.data_ptr();
    let alias = t.shallow_clone();
    group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
    assert_eq!((t.data_ptr(), read(&alias)), (before, vec![n, n]));
}
