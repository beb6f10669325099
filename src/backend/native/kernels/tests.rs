use half::{bf16, f16};
use tch::Kind;

use super::select::Isa;
use super::{Operand, Reducer};
use crate::ReduceOp;

const KINDS: [Kind; 12] = [
    Kind::Uint8,
    Kind::Int8,
    Kind::Int16,
    Kind::Int,
    Kind::Int64,
    Kind::Half,
    Kind::BFloat16,
    Kind::Float,
    Kind::Double,
    Kind::Bool,
    Kind::ComplexFloat,
    Kind::ComplexDouble,
];
const OPS: [ReduceOp; 9] = [
    ReduceOp::Sum,
    ReduceOp::Avg,
    ReduceOp::Product,
    ReduceOp::Min,
    ReduceOp::Max,
    ReduceOp::BitAnd,
    ReduceOp::BitOr,
    ReduceOp::BitXor,
    ReduceOp::PremulSum(0.5),
];

/// The table in the docs of `ReduceOp`.
fn means_something(op: ReduceOp, kind: Kind) -> bool {
    use ReduceOp::*;
    let float = matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double);
    let complex = matches!(kind, Kind::ComplexFloat | Kind::ComplexDouble);
    match op {
        Sum | Product => true,
        Avg => kind != Kind::Bool,
        Min | Max => !complex,
        BitAnd | BitOr | BitXor => !float && !complex,
        // PremulSum.
        _ => float || complex,
    }
}

fn isas() -> Vec<Isa> {
    let mut all = vec![Isa::Plain];
    #[cfg(target_arch = "x86_64")]
    {
        let best = Isa::detect();
        if best == Isa::Avx512 {
            all.push(Isa::Avx2);
        }
        if best != Isa::Plain {
            all.push(best);
        }
    }
    all
}

/// A small generator, the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn float(&mut self) -> f64 {
        match self.next() % 16 {
            0 => f64::NAN,
            1 => f64::INFINITY,
            2 => f64::NEG_INFINITY,
            3 => 0.0,
            4 => -0.0,
            5 => 1e-40, // subnormal as f32, zero as f16
            6 => 65504.0,
            _ => (self.next() % 4001) as f64 / 16.0 - 125.0,
        }
    }

    /// `n` elements of a kind, as bytes.
    fn data(&mut self, kind: Kind, n: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for _ in 0..n {
            match kind {
                Kind::Bool => out.push((self.next() % 2) as u8),
                Kind::Half => out.extend(f16::from_f64(self.float()).to_ne_bytes()),
                Kind::BFloat16 => out.extend(bf16::from_f64(self.float()).to_ne_bytes()),
                Kind::Float => out.extend((self.float() as f32).to_ne_bytes()),
                Kind::Double => out.extend(self.float().to_ne_bytes()),
                Kind::ComplexFloat => {
                    out.extend((self.float() as f32).to_ne_bytes());
                    out.extend((self.float() as f32).to_ne_bytes());
                }
                Kind::ComplexDouble => {
                    out.extend(self.float().to_ne_bytes());
                    out.extend(self.float().to_ne_bytes());
                }
                _ => out.extend(&self.next().to_ne_bytes()[..kind.elt_size_in_bytes()]),
            }
        }
        out
    }
}

macro_rules! get {
    ($t:ty, $bytes:expr, $i:expr) => {
        <$t>::from_ne_bytes($bytes[$i * size_of::<$t>()..($i + 1) * size_of::<$t>()].try_into().unwrap())
    };
}

macro_rules! model_integer {
    ($t:ty, $op:expr, $ranks:expr, $src:expr, $i:expr) => {{
        let values: Vec<$t> = $src.iter().map(|s| get!($t, s, $i)).collect();
        let fold = |f: fn($t, $t) -> $t| values.iter().copied().reduce(f).unwrap();
        match $op {
            ReduceOp::Sum => fold(<$t>::wrapping_add),
            ReduceOp::Avg => (i128::from(fold(<$t>::wrapping_add)) / $ranks as i128) as $t,
            ReduceOp::Product => fold(<$t>::wrapping_mul),
            ReduceOp::Min => fold(|a, b| a.min(b)),
            ReduceOp::Max => fold(|a, b| a.max(b)),
            ReduceOp::BitAnd => fold(|a, b| a & b),
            ReduceOp::BitOr => fold(|a, b| a | b),
            ReduceOp::BitXor => fold(|a, b| a ^ b),
            _ => unreachable!(),
        }
        .to_ne_bytes()
        .to_vec()
    }};
}

macro_rules! model_float {
    ($t:ty, $op:expr, $ranks:expr, $factors:expr, $values:expr) => {{
        let values: Vec<$t> = $values;
        let fold = |f: fn($t, $t) -> $t| values.iter().copied().reduce(f).unwrap();
        match $op {
            ReduceOp::Sum => fold(|a, b| a + b),
            ReduceOp::Avg => fold(|a, b| a + b) / $ranks as $t,
            ReduceOp::Product => fold(|a, b| a * b),
            ReduceOp::Min => fold(|a, b| if a.is_nan() || b.is_nan() { <$t>::NAN } else { a.min(b) }),
            ReduceOp::Max => fold(|a, b| if a.is_nan() || b.is_nan() { <$t>::NAN } else { a.max(b) }),
            ReduceOp::PremulSum(_) => {
                let scaled = values.iter().zip($factors).map(|(v, f)| *v * *f as $t);
                scaled.reduce(|a, b| a + b).unwrap()
            }
            _ => unreachable!(),
        }
    }};
}

macro_rules! model_complex {
    ($t:ty, $op:expr, $ranks:expr, $factors:expr, $src:expr, $i:expr) => {{
        let part = |p: usize| $src.iter().map(|s| get!($t, s, 2 * $i + p)).collect::<Vec<$t>>();
        let (re, im) = match $op {
            ReduceOp::Product => {
                let both = part(0).into_iter().zip(part(1));
                both.reduce(|a, b| (a.0 * b.0 - a.1 * b.1, a.0 * b.1 + a.1 * b.0)).unwrap()
            }
            _ => (
                model_float!($t, $op, $ranks, $factors, part(0)),
                model_float!($t, $op, $ranks, $factors, part(1)),
            ),
        };
        [re.to_ne_bytes(), im.to_ne_bytes()].concat()
    }};
}

/// The value of a half.
fn value(kind: Kind, bits: u16) -> f32 {
    if kind == Kind::Half { f16::from_bits(bits).to_f32() } else { bf16::from_bits(bits).to_f32() }
}

/// The half nearest to a value.
fn nearest(kind: Kind, value: f32) -> u16 {
    if kind == Kind::Half { f16::from_f32(value).to_bits() } else { bf16::from_f32(value).to_bits() }
}

fn model_half(kind: Kind, op: ReduceOp, ranks: usize, factors: &[f64], src: &[Vec<u8>], i: usize) -> Vec<u8> {
    let values = src.iter().map(|s| value(kind, get!(u16, s, i))).collect();
    nearest(kind, model_float!(f32, op, ranks, factors, values)).to_ne_bytes().to_vec()
}

/// One element at a time, in the kind's own arithmetic.
fn model(op: ReduceOp, kind: Kind, ranks: usize, factors: &[f64], src: &[Vec<u8>], i: usize) -> Vec<u8> {
    match kind {
        Kind::Uint8 => model_integer!(u8, op, ranks, src, i),
        Kind::Int8 => model_integer!(i8, op, ranks, src, i),
        Kind::Int16 => model_integer!(i16, op, ranks, src, i),
        Kind::Int => model_integer!(i32, op, ranks, src, i),
        Kind::Int64 => model_integer!(i64, op, ranks, src, i),
        Kind::Half => model_half(kind, op, ranks, factors, src, i),
        Kind::BFloat16 => model_half(kind, op, ranks, factors, src, i),
        Kind::Float => {
            let values = src.iter().map(|s| get!(f32, s, i)).collect();
            model_float!(f32, op, ranks, factors, values).to_ne_bytes().to_vec()
        }
        Kind::Double => {
            let values = src.iter().map(|s| get!(f64, s, i)).collect();
            model_float!(f64, op, ranks, factors, values).to_ne_bytes().to_vec()
        }
        Kind::ComplexFloat => model_complex!(f32, op, ranks, factors, src, i),
        Kind::ComplexDouble => model_complex!(f64, op, ranks, factors, src, i),
        Kind::Bool => {
            let mut bools = src.iter().map(|s| s[i] != 0);
            let all = match op {
                ReduceOp::Sum | ReduceOp::Max | ReduceOp::BitOr => bools.any(|b| b),
                ReduceOp::Product | ReduceOp::Min | ReduceOp::BitAnd => bools.all(|b| b),
                _ => bools.fold(false, |a, b| a ^ b),
            };
            vec![u8::from(all)]
        }
        _ => unreachable!(),
    }
}

/// Whether two results are the same: the same bits, or NaN both (whose payload nobody promises), or
/// zeros of different signs where min or max had to choose between them.
fn same(op: ReduceOp, kind: Kind, a: &[u8], b: &[u8]) -> bool {
    let zero_or_equal = |x: f64, y: f64| x == y && matches!(op, ReduceOp::Min | ReduceOp::Max) && x == 0.0;
    let floats = |bytes: &[u8]| -> Vec<f64> {
        match kind {
            Kind::Half => bytes.chunks(2).map(|c| get!(f16, c, 0).to_f64()).collect(),
            Kind::BFloat16 => bytes.chunks(2).map(|c| get!(bf16, c, 0).to_f64()).collect(),
            Kind::Float | Kind::ComplexFloat => bytes.chunks(4).map(|c| f64::from(get!(f32, c, 0))).collect(),
            Kind::Double | Kind::ComplexDouble => bytes.chunks(8).map(|c| get!(f64, c, 0)).collect(),
            _ => Vec::new(),
        }
    };
    let (x, y) = (floats(a), floats(b));
    if x.is_empty() {
        return a == b;
    }
    x.iter()
        .zip(&y)
        .all(|(x, y)| (x.is_nan() && y.is_nan()) || x.to_bits() == y.to_bits() || zero_or_equal(*x, *y))
}

fn factors(op: ReduceOp, n: usize) -> Vec<f64> {
    (0..n).map(|r| if matches!(op, ReduceOp::PremulSum(_)) { 0.5 + r as f64 / 3.0 } else { 1.0 }).collect()
}

fn operands(src: &[Vec<u8>], factors: &[f64]) -> Vec<Operand> {
    src.iter().zip(factors).map(|(s, &factor)| Operand { data: s.as_ptr(), factor }).collect()
}

#[test]
fn what_the_table_of_ops_and_kinds_allows_is_what_can_be_made() {
    for op in OPS {
        for kind in KINDS {
            let made = Reducer::new(op, kind, 3);
            assert_eq!(made.is_ok(), means_something(op, kind), "{op} {kind:?}");
            if let Err(words) = made {
                assert!(words.contains(&op.to_string()) && words.contains(&format!("{kind:?}")));
            }
        }
    }
    assert!(Reducer::new(ReduceOp::Sum, Kind::QInt8, 2).is_err());
}

#[test]
fn every_op_of_every_kind_gives_what_one_element_at_a_time_gives() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for isa in isas() {
        for op in OPS {
            for kind in KINDS.into_iter().filter(|&k| means_something(op, k)) {
                let sizes =
                    [(1, 3), (2, 1), (2, 200), (3, 129), (4, 64), (5, 1), (5, 77), (8, 1100), (11, 5)];
                // Miri is slow.
                for (ranks, numel) in sizes.into_iter().filter(|&(_, n)| n == 3 || n == 77 || !cfg!(miri)) {
                    let reducer = Reducer::with(op, kind, ranks, isa).unwrap();
                    let src: Vec<_> = (0..ranks).map(|_| random.data(kind, numel)).collect();
                    let factors = factors(op, ranks);
                    let size = kind.elt_size_in_bytes();
                    // One byte off, so that nothing is aligned.
                    let mut dst = vec![0xaa_u8; numel * size + 2];
                    // SAFETY: all buffers hold `numel` elements.
                    unsafe {
                        reducer.reduce(dst[1..].as_mut_ptr(), &operands(&src, &factors), numel);
                    }
                    assert_eq!((dst[0], dst[numel * size + 1]), (0xaa, 0xaa), "written outside");
                    for i in 0..numel {
                        let want = model(op, kind, ranks, &factors, &src, i);
                        let got = &dst[1 + i * size..1 + (i + 1) * size];
                        assert!(
                            same(op, kind, got, &want),
                            "{isa:?} {op} {kind:?} ranks {ranks} element {i} of {numel}: {got:?}, want {want:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn the_destination_may_be_any_of_the_operands() {
    let mut random = Random(77);
    for op in [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max] {
        for kind in [Kind::Int16, Kind::BFloat16, Kind::Float, Kind::Double] {
            for ranks in [1, 2, 4, 7] {
                for target in 0..ranks {
                    let numel = if cfg!(miri) { 70 } else { 700 };
                    let reducer = Reducer::new(op, kind, ranks).unwrap();
                    let mut src: Vec<_> = (0..ranks).map(|_| random.data(kind, numel)).collect();
                    let factors = factors(op, ranks);
                    let mut apart = vec![0; numel * kind.elt_size_in_bytes()];
                    // SAFETY: all buffers hold `numel` elements.
                    unsafe {
                        reducer.reduce(apart.as_mut_ptr(), &operands(&src, &factors), numel);
                        let dst = src[target].as_mut_ptr();
                        reducer.reduce(dst, &operands(&src, &factors), numel);
                    }
                    assert!(same(op, kind, &src[target], &apart), "{op} {kind:?} {target} of {ranks}");
                }
            }
        }
    }
}

#[test]
fn every_half_survives_the_way_to_f32_and_back_and_every_tie_goes_to_even() {
    for (kind, isa) in isas().into_iter().flat_map(|i| [(Kind::Half, i), (Kind::BFloat16, i)]) {
        let value = |bits: u16| value(kind, bits);
        // Miri is slow: some.
        let some = |bits: &u16| !cfg!(miri) || bits.is_multiple_of(149);
        let bits: Vec<u16> = (0..=u16::MAX).filter(some).collect();
        let mut back = vec![0_u16; bits.len()];
        let alone = [Operand { data: bits.as_ptr().cast(), factor: 1.0 }];
        // SAFETY: both hold so many elements.
        unsafe {
            let copy = Reducer::with(ReduceOp::Sum, kind, 1, isa).unwrap();
            copy.reduce(back.as_mut_ptr().cast(), &alone, bits.len());
        }
        for (&b, &round) in bits.iter().zip(&back) {
            assert!(round == b || (value(b).is_nan() && value(round).is_nan()), "{kind:?} {b:#x}");
        }
        // Halfway between each half and the next, and a little to both sides of it: from a half, times a
        // factor that is as exact as f32 is.
        for factor in [1.0 + f64::powi(2.0, -9), 1.0 + f64::powi(2.0, -12), 1.0 / 3.0, -1e-4] {
            let scaled = [Operand { factor, ..alone[0] }];
            // SAFETY: as above.
            unsafe {
                let scale = Reducer::with(ReduceOp::PremulSum(factor), kind, 1, isa).unwrap();
                scale.reduce(back.as_mut_ptr().cast(), &scaled, bits.len());
            }
            for (&b, &scaled) in bits.iter().zip(&back).filter(|&(&b, _)| !value(b).is_nan()) {
                let want = value(b) * factor as f32;
                assert_eq!(scaled, nearest(kind, want), "{kind:?} {want:e} {isa:?}");
            }
        }
    }
}

#[test]
fn bytes_average_over_more_ranks_than_a_byte_can_count() {
    let reducer = Reducer::new(ReduceOp::Avg, Kind::Int8, 200).unwrap();
    let src = [100i8; 3];
    let operands = vec![Operand { data: src.as_ptr().cast(), factor: 1.0 }; 200];
    let mut dst = [0i8; 3];
    // SAFETY: both hold three elements.
    unsafe { reducer.reduce(dst.as_mut_ptr().cast(), &operands, 3) };
    // The sum, 20000, wraps to 32; divided by 200 that is 0.
    assert_eq!(dst, [0; 3]);
}
