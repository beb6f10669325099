//! The reduction kernels, beside the rate at which this machine copies memory, and what a call costs before
//! anything moves.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tch::{Device, Kind, Tensor};
use tch_distributed as dist;
use tch_distributed::ReduceOp;

use dist::InitOptions;

// The kernels are no part of the public API: this is their source.
#[allow(dead_code, unreachable_pub, unused_imports, reason = "the library uses all of it")]
#[path = "../src/backend/native/kernels/mod.rs"]
mod kernels;

use kernels::{Operand, Reducer};

const SIZES: [usize; 3] = [64 << 10, 1 << 20, 16 << 20];

/// What reading and writing memory costs at these sizes: bytes written a second.
fn copy(c: &mut Criterion) {
    let mut group = c.benchmark_group("copy");
    for bytes in SIZES {
        let from = vec![1_u8; bytes];
        let mut to = vec![0_u8; bytes];
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(BenchmarkId::from_parameter(bytes), |b| {
            b.iter(|| to.copy_from_slice(black_box(&from)));
        });
    }
    group.finish();
}

/// Combining operands into the first of them: bytes of the result a second.
fn reduce(c: &mut Criterion) {
    let mut group = c.benchmark_group("reduce");
    let kinds = [
        ("f32", Kind::Float),
        ("f64", Kind::Double),
        ("bf16", Kind::BFloat16),
        ("f16", Kind::Half),
        ("i32", Kind::Int),
        ("u8", Kind::Uint8),
    ];
    for (name, kind) in kinds {
        for (op, ranks) in [
            (ReduceOp::Sum, 2),
            (ReduceOp::Avg, 2),
            (ReduceOp::Max, 2),
            (ReduceOp::Sum, 4),
            (ReduceOp::Sum, 8),
        ] {
            let Ok(reducer) = Reducer::new(op, kind, ranks) else { continue };
            for bytes in SIZES {
                let mut buffers = vec![vec![0_u8; bytes]; ranks];
                let dst = buffers[0].as_mut_ptr();
                let operands: Vec<_> =
                    buffers.iter().map(|b| Operand { data: b.as_ptr(), factor: 1.0 }).collect();
                group.throughput(Throughput::Bytes(bytes as u64));
                group.bench_function(BenchmarkId::new(format!("{name} {op} of {ranks}"), bytes), |b| {
                    // SAFETY: all hold as many bytes, and the destination is the first operand.
                    b.iter(|| unsafe {
                        reducer.reduce(dst, black_box(&operands), bytes / kind.elt_size_in_bytes());
                    });
                });
            }
        }
    }
    group.finish();
}

/// What a call costs before anything moves: a group of one, checks and all.
fn dispatch(c: &mut Criterion) {
    let options = InitOptions::new().rank(0).world_size(1);
    let alone = dist::init_process_group("native", options).expect("a world of one");
    let mut tensor = Tensor::zeros([1], (Kind::Float, Device::Cpu));
    c.bench_function("all_reduce in a world of one", |b| {
        b.iter(|| alone.all_reduce(&mut tensor, ReduceOp::Sum).expect("a world of one"));
    });
    dist::destroy_process_group().expect("nothing is pending");
}

criterion_group!(benches, copy, dispatch, reduce);
criterion_main!(benches);
