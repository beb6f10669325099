//! Point to point.

use tch::{Device, Kind, Tensor};
use tch_distributed::{P2pOp, ProcessGroup};

use super::{list, numbers, read, room};

list! {
    2 messages_of_one_tag_arrive_in_order;
    1 a_message_to_oneself_arrives;
    2 all_pairs_at_once_do_not_deadlock_in_any_order;
    2 a_strided_receive_is_filled_in_place;
    2 large_messages_both_ways_at_once_do_not_deadlock;

    free order:
    2 tags_keep_messages_apart_whatever_their_order;
    2 a_receive_from_anybody_tells_who_sent;
    2 a_receive_may_be_posted_before_or_after_its_send;
    2 messages_and_collectives_do_not_disturb_each_other;
    2 hundreds_of_messages_may_be_outstanding;
}

fn messages_of_one_tag_arrive_in_order(group: &ProcessGroup) {
    if group.rank() == 0 {
        for i in 0..50 {
            group.send(&numbers(&[i]), 1, 4).unwrap();
        }
    } else if group.rank() == 1 {
        for i in 0..50 {
            let mut t = room(1);
            group.recv(&mut t, 0, 4).unwrap();
            assert_eq!(read(&t), [i]);
        }
    }
}

fn tags_keep_messages_apart_whatever_their_order(group: &ProcessGroup) {
    if group.rank() == 0 {
        let works: Vec<_> = (0..5).map(|tag| group.isend(&numbers(&[tag]), 1, tag as u32).unwrap()).collect();
        works.iter().for_each(|w| w.wait().unwrap());
    } else if group.rank() == 1 {
        for tag in [3u32, 0, 4, 1, 2] {
            let mut t = room(1);
            group.recv(&mut t, 0, tag).unwrap();
            assert_eq!(read(&t), [i64::from(tag)]);
        }
    }
}

fn a_receive_from_anybody_tells_who_sent(group: &ProcessGroup) {
    let n = group.size();
    if group.rank() == 0 {
        let mut senders: Vec<usize> = (1..n)
            .map(|_| {
                let mut t = room(1);
                let from = group.recv(&mut t, None, 8).unwrap();
                assert_eq!(read(&t), [from as i64]);
                from
            })
            .collect();
        senders.sort_unstable();
        assert_eq!(senders, (1..n).collect::<Vec<_>>());
    } else {
        group.send(&numbers(&[group.rank() as i64]), 0, 8).unwrap();
    }
}

fn a_receive_may_be_posted_before_or_after_its_send(group: &ProcessGroup) {
    for receiver_first in [true, false] {
        if group.rank() == 0 {
            let t = room(1);
            let early = receiver_first.then(|| group.irecv(&t, 1, 2).unwrap());
            group.barrier().unwrap();
            group.barrier().unwrap();
            let work = early.unwrap_or_else(|| group.irecv(&t, 1, 2).unwrap());
            work.wait().unwrap();
            assert_eq!((read(&t), work.source_rank()), (vec![77], Some(1)));
        } else {
            group.barrier().unwrap();
            let sent = (group.rank() == 1).then(|| group.isend(&numbers(&[77]), 0, 2).unwrap());
            group.barrier().unwrap();
            sent.iter().for_each(|w| w.wait().unwrap());
        }
    }
}

fn a_message_to_oneself_arrives(group: &ProcessGroup) {
    let me = group.rank();
    let (a, b) = (room(2), room(2));
    let early = group.irecv(&a, me, 1).unwrap();
    let sent =
        [group.isend(&numbers(&[1, 2]), me, 1).unwrap(), group.isend(&numbers(&[3, 4]), me, 1).unwrap()];
    let late = group.irecv(&b, me, 1).unwrap();
    for work in sent.iter().chain([&early, &late]) {
        work.wait().unwrap();
    }
    assert_eq!((read(&a), read(&b)), (vec![1, 2], vec![3, 4]));
    assert_eq!(late.source_rank(), Some(me));
}

fn all_pairs_at_once_do_not_deadlock_in_any_order(group: &ProcessGroup) {
    let (me, n) = (group.rank(), group.size());
    for turn in 0..n {
        let outs: Vec<Tensor> = (0..n).map(|_| room(1000)).collect();
        let mut ops: Vec<P2pOp> = (0..n)
            .map(|to| P2pOp::send(&numbers(&vec![(me * n + to) as i64; 1000]), to, 0))
            .chain((0..n).map(|from| P2pOp::recv(&outs[from], from, 0)))
            .collect();
        ops.rotate_left((turn * 3 + me) % (2 * n));
        for work in group.batch_isend_irecv(ops).unwrap() {
            work.wait().unwrap();
        }
        for (from, out) in outs.iter().enumerate() {
            assert_eq!(read(out), vec![(from * n + me) as i64; 1000]);
        }
    }
}

fn messages_and_collectives_do_not_disturb_each_other(group: &ProcessGroup) {
    let (me, n) = (group.rank(), group.size());
    let got = room(1);
    let received = group.irecv(&got, (me + n - 1) % n, 0).unwrap();
    let mut sum = numbers(&[1]);
    group.all_reduce(&mut sum, tch_distributed::ReduceOp::Sum).unwrap();
    let sent = group.isend(&numbers(&[me as i64]), (me + 1) % n, 0).unwrap();
    group.barrier().unwrap();
    received.wait().unwrap();
    sent.wait().unwrap();
    assert_eq!((read(&got), read(&sum)), (vec![((me + n - 1) % n) as i64], vec![n as i64]));
}

fn a_strided_receive_is_filled_in_place(group: &ProcessGroup) {
    let grid = Tensor::zeros([3, 2], (Kind::Int64, Device::Cpu));
    if group.rank() == 0 {
        group.send(&numbers(&[1, 9, 2, 9, 3, 9]).view([3, 2]).select(1, 0), 1, 0).unwrap();
    } else if group.rank() == 1 {
        group.recv(&mut grid.select(1, 1), 0, 0).unwrap();
        assert_eq!(read(&grid), [0, 1, 0, 2, 0, 3]);
    }
}

fn hundreds_of_messages_may_be_outstanding(group: &ProcessGroup) {
    let (me, n) = (group.rank(), group.size());
    let (next, before) = ((me + 1) % n, (me + n - 1) % n);
    let sent: Vec<_> = (0..300).map(|i| group.isend(&numbers(&[i]), next, (i % 7) as u32).unwrap()).collect();
    let outs: Vec<Tensor> = (0..300).map(|_| room(1)).collect();
    let received: Vec<_> = (0..300).map(|i| group.irecv(&outs[i], before, (i % 7) as u32).unwrap()).collect();
    received.iter().chain(&sent).for_each(|w| w.wait().unwrap());
    assert!(outs.iter().enumerate().all(|(i, t)| read(t) == [i as i64]));
}

fn large_messages_both_ways_at_once_do_not_deadlock(group: &ProcessGroup) {
    if group.rank() > 1 {
        return;
    }
    let peer = 1 - group.rank();
    let mine = Tensor::full([3_000_000], group.rank() as i64, (Kind::Uint8, Device::Cpu));
    let theirs = mine.zeros_like();
    let works =
        group.batch_isend_irecv(vec![P2pOp::send(&mine, peer, 0), P2pOp::recv(&theirs, peer, 0)]).unwrap();
    works.iter().for_each(|w| w.wait().unwrap());
    assert_eq!(theirs.sum(Kind::Int64).int64_value(&[]), 3_000_000 * peer as i64);
}
