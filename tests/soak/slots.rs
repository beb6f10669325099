//! The memory that groups of processes share for what they exchange.

use std::fs;

use tch::{Device, Kind, Tensor};
use tch_distributed::{P2pOp, ReduceOp, destroy_process_group, init_process_group, testing};

/// This process's part of the memory that is really there in segments of ours (its "proportional set").
fn slots() -> u64 {
    let maps = fs::read_to_string("/proc/self/smaps").expect("procfs");
    let mut ours = false;
    let mut kib = 0;
    for line in maps.lines() {
        let (first, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        if !first.ends_with(':') {
            ours = rest.contains("memfd:tch-distributed");
        } else if ours && first == "Pss:" {
            kib += rest.trim().trim_end_matches(" kB").parse::<u64>().expect("a number of kB");
        }
    }
    kib << 10
}

#[test]
fn those_of_many_groups_take_no_more_than_their_limit_together_and_nothing_before_they_are_used() {
    let name =
        "slots::those_of_many_groups_take_no_more_than_their_limit_together_and_nothing_before_they_are_used";
    testing::run_processes(2, name, || {
        const GROUPS: u64 = 50;
        /// What a group has besides slots: headers, with room for small messages.
        const HEADERS: u64 = 64 << 10;
        const LIMIT: u64 = 32 << 20;
        let group = init_process_group("native", super::options()).unwrap();
        let (me, other) = (group.rank(), 1 - group.rank());
        let mut groups = Vec::new();
        for n in 0..GROUPS {
            let before = slots();
            let own = group.new_group(&[0, 1]).unwrap().unwrap();
            own.barrier().unwrap();
            let made = slots();
            assert!(made <= before + HEADERS, "group {n}, not used yet, takes {} bytes", made - before);
            // Enough for every slot, of collectives and of messages.
            let mut sum = Tensor::full([1 << 20], me as i64 + 1, (Kind::Float, Device::Cpu));
            let got = sum.zeros_like();
            let both = vec![P2pOp::recv(&got, other, 0), P2pOp::send(&sum.copy(), other, 0)];
            own.batch_isend_irecv(both).unwrap().iter().for_each(|work| work.wait().unwrap());
            own.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            assert!(sum.equal(&sum.full_like(3.0)) && got.equal(&got.full_like(other as f64 + 1.0)));
            groups.push(own);
        }
        group.barrier().unwrap();
        let used = slots();
        group.barrier().unwrap();
        assert!(used > LIMIT / 2, "{used} bytes: {GROUPS} groups should have used up most of the limit");
        assert!(used <= LIMIT + (GROUPS + 1) * HEADERS, "the slots of {GROUPS} groups take {used} bytes");
        destroy_process_group().unwrap();
    });
}
