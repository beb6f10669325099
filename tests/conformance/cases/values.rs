//! What reductions compute.

use tch::{Device, Kind, Tensor};
use tch_distributed::{ProcessGroup, ReduceOp};

use super::{is_libtorchs, list, numbers, read};

list! {
    2 integers_wrap;
    2 an_integer_average_is_divided_toward_zero;
    2 minimum_and_maximum_propagate_nan;
    2 infinities_and_signed_zeros_are_kept;
    2 halves_are_accumulated_in_f32_and_rounded_once;
    2 bool_sums_are_or_and_products_are_and;
    2 each_rank_may_give_its_own_factor_of_premul_sum;
    2 reduce_leaves_the_other_ranks_alone;
    2 results_are_the_same_bits_on_every_rank;
}

fn integers_wrap(group: &ProcessGroup) {
    let n = group.size() as i64;
    let mut t = Tensor::from_slice(&[255u8, 200]);
    group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
    assert_eq!(read(&t), [255 * n % 256, 200 * n % 256]);
    let mut t = numbers(&[i64::MAX]);
    group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
    assert_eq!(read(&t), [i64::MAX.wrapping_mul(n)]);
    let mut t = Tensor::from_slice(&[i32::MAX, -3]);
    group.all_reduce(&mut t, ReduceOp::Product).unwrap();
    let powers = [i32::MAX, -3].map(|x| i64::from(x.wrapping_pow(n as u32)));
    assert_eq!(read(&t), powers);
}

fn an_integer_average_is_divided_toward_zero(group: &ProcessGroup) {
    let n = group.size() as i64;
    let mut t = if group.rank() == 0 { numbers(&[-1, 1, n]) } else { numbers(&[0, 0, n]) };
    group.all_reduce(&mut t, ReduceOp::Avg).unwrap();
    assert_eq!(read(&t), [0, 0, n]);
}

fn minimum_and_maximum_propagate_nan(group: &ProcessGroup) {
    if is_libtorchs(group) {
        return; // which operand wins is its own affair
    }
    for kind in [Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double] {
        for op in [ReduceOp::Min, ReduceOp::Max] {
            // NaN on one rank each time: whichever operand it is, it wins.
            for at in 0..group.size() {
                let mine = if group.rank() == at { f64::NAN } else { group.rank() as f64 };
                let mut t = Tensor::from_slice(&[mine, 1.0]).to_kind(kind);
                group.all_reduce(&mut t, op).unwrap();
                assert!(t.double_value(&[0]).is_nan(), "{op} of {kind:?} with NaN on rank {at}");
                assert_eq!(t.double_value(&[1]), 1.0);
            }
        }
    }
}

fn infinities_and_signed_zeros_are_kept(group: &ProcessGroup) {
    let mut t = Tensor::from_slice(&[f32::INFINITY, f32::NEG_INFINITY, -0.0]);
    group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
    let got = Vec::<f32>::try_from(t).unwrap();
    assert_eq!(got, [f32::INFINITY, f32::NEG_INFINITY, 0.0]);
    assert!(got[2].is_sign_negative());
    let mixed = if group.rank() == 0 { f32::INFINITY } else { f32::NEG_INFINITY };
    let mut t = Tensor::from_slice(&[mixed]);
    group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
    assert!(t.double_value(&[0]).is_nan());
}

fn halves_are_accumulated_in_f32_and_rounded_once(group: &ProcessGroup) {
    if is_libtorchs(group) {
        return; // rounds as it does
    }
    // 1 and many numbers that each round away when added to it alone.
    for (kind, tiny) in [(Kind::Half, 2f64.powi(-11)), (Kind::BFloat16, 2f64.powi(-8))] {
        let n = group.size() as f64;
        let mine = if group.rank() == 0 { 1.0 } else { tiny };
        let mut t = Tensor::from_slice(&[mine; 9]).to_kind(kind);
        group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
        let once = Tensor::from(1.0 + (n - 1.0) * tiny).to_kind(kind).double_value(&[]);
        assert_eq!(t.double_value(&[8]), once, "{kind:?}");
    }
    // Beyond the largest half only on the way.
    let mut t = Tensor::from_slice(&[if group.rank() < 2 { 60000.0f32 } else { 0.0 }]).to_kind(Kind::Half);
    group.all_reduce(&mut t, ReduceOp::Avg).unwrap();
    let expected = Tensor::from(120000.0 / group.size() as f64).to_kind(Kind::Half).double_value(&[]);
    assert_eq!(t.double_value(&[0]), expected);
}

fn bool_sums_are_or_and_products_are_and(group: &ProcessGroup) {
    let first = group.rank() == 0;
    for (op, expected) in [
        (ReduceOp::Sum, [true, true, false]),
        (ReduceOp::Max, [true, true, false]),
        (ReduceOp::BitOr, [true, true, false]),
        (ReduceOp::Product, [true, false, false]),
        (ReduceOp::Min, [true, false, false]),
        (ReduceOp::BitAnd, [true, false, false]),
        (ReduceOp::BitXor, [group.size() % 2 == 1, true, false]),
    ] {
        let mut t = Tensor::from_slice(&[true, first, false]);
        group.all_reduce(&mut t, op).unwrap();
        assert_eq!(Vec::<bool>::try_from(t).unwrap(), expected, "{op}");
    }
}

fn each_rank_may_give_its_own_factor_of_premul_sum(group: &ProcessGroup) {
    let n = group.size() as i64;
    let mut t = Tensor::ones([5], (Kind::Double, Device::Cpu));
    match group.all_reduce(&mut t, ReduceOp::PremulSum(group.rank() as f64 + 0.5)) {
        Ok(()) => assert_eq!(t.double_value(&[4]), (0..n).map(|r| r as f64 + 0.5).sum::<f64>()),
        Err(error) => assert_eq!(group.backend_name(), "gloo", "{error}"),
    }
}

fn reduce_leaves_the_other_ranks_alone(group: &ProcessGroup) {
    for root in 0..group.size() {
        let mut t = numbers(&vec![group.rank() as i64; 1000]);
        group.reduce(&mut t, root, ReduceOp::Sum).unwrap();
        let n = group.size() as i64;
        let expected = if group.rank() == root { n * (n - 1) / 2 } else { group.rank() as i64 };
        assert_eq!(read(&t), vec![expected; 1000]);
    }
}

fn results_are_the_same_bits_on_every_rank(group: &ProcessGroup) {
    for n in [1, 7, 1000, 70_001] {
        tch::manual_seed(group.rank() as i64);
        let mut t = (Tensor::arange(n, (Kind::Float, Device::Cpu)) * (group.rank() as f64 + 0.1)).sin() * 1e3;
        group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
        let bits = read(&t.view_dtype(Kind::Int));
        let first = group.broadcast_object(Some(bits.clone()), 0).unwrap();
        assert!(bits == first, "{n} elements differ between rank {} and rank 0", group.rank());
    }
}
