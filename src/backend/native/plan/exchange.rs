//! Large reductions by direct exchange: each rank gets every operand of its own share, combines them
//! in rank order in one pass, and passes the result on.
//!
//! It moves as few bytes as a ring (2 (n-1)/n of the data each way for an all-reduce), rounds once, and
//! gives the same bits whatever the number of chunks. Shares are cut into chunks, so that chunk k is
//! combined while chunk k+1 arrives.

use smallvec::SmallVec;

use super::{Cuts, Plan, Range, Shape, StepId, share};

/// How many chunks of a share may be on their way before the first has been combined.
const DEPTH: usize = 4;

/// By how many chunks the results lag behind the operands on each link.
const LAG: usize = 2;

/// Where the operands are read, and who gets the result.
struct Exchange<'a> {
    shape: &'a Shape,
    /// Elements of a chunk.
    chunk: usize,
    /// This rank's operand for each rank's share.
    operands: SmallVec<[Range; 8]>,
    /// Where this rank combines its own share; `None` to use scratch.
    own: Option<Range>,
    /// Where the results of each rank's share go here; empty where they do not come here.
    results: SmallVec<[Range; 8]>,
    /// Whether a rank gets the result of every share.
    gets: fn(usize, usize) -> bool,
    /// The root, for `gets`.
    root: usize,
}

pub(super) fn all_reduce(shape: &Shape, chunk: usize) -> Plan {
    let data = shape.output(0);
    let shares: SmallVec<[Range; 8]> = (0..shape.world)
        .map(|p| {
            let (start, len) = share(data.len, shape.world, p);
            data.part(start, len)
        })
        .collect();
    Exchange {
        shape,
        chunk,
        own: Some(shares[shape.rank]),
        operands: shares.clone(),
        results: shares,
        gets: |_, _| true,
        root: 0,
    }
    .plan()
}

pub(super) fn reduce(shape: &Shape, dst: usize, chunk: usize) -> Plan {
    let part = |of: Range, p: usize| {
        let (start, len) = share(of.len, shape.world, p);
        of.part(start, len)
    };
    let root = shape.rank == dst;
    Exchange {
        shape,
        chunk,
        operands: (0..shape.world).map(|p| part(shape.input(0), p)).collect(),
        own: root.then(|| part(shape.output(0), dst)),
        results: if root {
            (0..shape.world).map(|p| part(shape.output(0), p)).collect()
        } else {
            SmallVec::new()
        },
        gets: |rank, root| rank == root,
        root: dst,
    }
    .plan()
}

pub(super) fn reduce_scatter(shape: &Shape, chunk: usize) -> Plan {
    Exchange {
        shape,
        chunk,
        operands: (0..shape.world).map(|p| shape.input(p)).collect(),
        own: Some(shape.output(0)),
        results: SmallVec::new(),
        gets: |_, _| false,
        root: 0,
    }
    .plan()
}

impl Exchange<'_> {
    fn plan(&self) -> Plan {
        let Shape { rank, world, .. } = *self.shape;
        let mut plan = Plan::default();
        let mine = self.operands[rank];
        let cuts = |of: Range| Cuts::new(of.len, self.chunk);
        let rounds = self.operands.iter().map(|r| cuts(*r).count).max().unwrap_or(0) + LAG;
        let widest = cuts(mine).widest();
        // Slots to receive operands in, DEPTH for each peer, and to combine in where there is no room.
        let depth = DEPTH.min(cuts(mine).count);
        let landing: SmallVec<[SmallVec<[Range; DEPTH]>; 8]> = (0..world)
            .map(|p| (0..depth).filter(|_| p != rank).map(|_| plan.slot(widest)).collect())
            .collect();
        let beside: SmallVec<[Range; DEPTH]> = match self.own {
            Some(_) => SmallVec::new(),
            None => (0..depth).map(|_| plan.slot(widest)).collect(),
        };
        let mut sent_operand: Vec<Vec<StepId>> = vec![Vec::new(); world];
        let mut combined: Vec<StepId> = Vec::new();
        let mut sent_result: Vec<StepId> = Vec::new();
        for round in 0..rounds {
            // Operands of chunk `round` go out and come in.
            for peer in self.shape.peers() {
                if let Some((start, len)) = cuts(self.operands[peer]).get(round) {
                    let step = plan.send(peer, self.operands[peer].part(start, len), &[]);
                    sent_operand[peer].push(step);
                }
            }
            if let Some((start, len)) = cuts(mine).get(round) {
                let free: SmallVec<[StepId; 1]> =
                    round.checked_sub(depth).map(|r| combined[r]).into_iter().collect();
                let mut after = SmallVec::<[StepId; 8]>::new();
                let mut operands: SmallVec<[Range; 4]> = SmallVec::from_elem(mine.part(start, len), world);
                for peer in self.shape.peers() {
                    operands[peer] = landing[peer][round % depth].part(0, len);
                    after.push(plan.recv(peer, operands[peer], &free));
                }
                let into = match self.own {
                    Some(own) => own.part(start, len),
                    None => {
                        after.extend(round.checked_sub(depth).map(|r| sent_result[r]));
                        beside[round % depth].part(0, len)
                    }
                };
                combined.push(plan.reduce(into, operands, &after));
            }
            // Results of chunk `round - LAG` go out and come in.
            let Some(round) = round.checked_sub(LAG) else { continue };
            for peer in self.shape.peers() {
                if let Some((start, len)) = cuts(mine).get(round)
                    && (self.gets)(peer, self.root)
                {
                    let from = match self.own {
                        Some(own) => own.part(start, len),
                        None => beside[round % depth].part(0, len),
                    };
                    sent_result.push(plan.send(peer, from, &[combined[round]]));
                }
                if let (Some(&result), Some((start, len))) =
                    (self.results.get(peer), cuts(self.operands[peer]).get(round))
                {
                    plan.recv(peer, result.part(start, len), &[sent_operand[peer][round]]);
                }
            }
        }
        plan
    }
}
