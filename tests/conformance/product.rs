//! Collective × kind × operation × memory layout × size × form, each against the model.

use std::fmt;

use tch::{Kind, Tensor};
use tch_distributed::{Error, P2pOp, ProcessGroup, ReduceOp, Result, Work};

use super::model::{self, KINDS, OPS, same, values};

/// What is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    AllReduce,
    Reduce,
    ReduceScatter,
    ReduceScatterTensor,
    AllReduceCoalesced,
    Broadcast,
    AllGather,
    AllGatherUneven,
    AllGatherIntoTensor,
    AllGatherStacked,
    Gather,
    Scatter,
    AllToAll,
    AllToAllSingle,
    AllToAllSplits,
    Ring,
    AllPairs,
}

/// How the elements of each tensor lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Contiguous,
    /// In the middle of a larger tensor.
    Offset,
    /// Every second element of a larger tensor.
    Strided,
    Transposed,
}

/// How many elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    Empty,
    One,
    Odd,
    Large,
}

/// How it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Blocking,
    Awaited,
    /// The Work is dropped at once; a barrier tells when it is done.
    Dropped,
}

pub const COLLECTIVES: [Collective; 17] = [
    Collective::AllReduce,
    Collective::Reduce,
    Collective::ReduceScatter,
    Collective::ReduceScatterTensor,
    Collective::AllReduceCoalesced,
    Collective::Broadcast,
    Collective::AllGather,
    Collective::AllGatherUneven,
    Collective::AllGatherIntoTensor,
    Collective::AllGatherStacked,
    Collective::Gather,
    Collective::Scatter,
    Collective::AllToAll,
    Collective::AllToAllSingle,
    Collective::AllToAllSplits,
    Collective::Ring,
    Collective::AllPairs,
];
pub const LAYOUTS: [Layout; 4] = [Layout::Contiguous, Layout::Offset, Layout::Strided, Layout::Transposed];
pub const SIZES: [Size; 4] = [Size::Empty, Size::One, Size::Odd, Size::Large];
pub const FORMS: [Form; 3] = [Form::Blocking, Form::Awaited, Form::Dropped];

/// One point of the product.
#[derive(Clone, Copy, PartialEq)]
pub struct Case {
    pub collective: Collective,
    pub kind: Kind,
    pub op: Option<ReduceOp>,
    pub layout: Layout,
    pub size: Size,
    pub form: Form,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { collective, kind, op, layout, size, form } = self;
        write!(f, "{collective:?} {kind:?} ")?;
        if let Some(op) = op {
            write!(f, "{op} ")?;
        }
        write!(f, "{layout:?} {size:?} {form:?}")
    }
}

impl Collective {
    fn reduces(self) -> bool {
        use Collective::{AllReduce, AllReduceCoalesced, Reduce, ReduceScatter, ReduceScatterTensor};
        matches!(self, AllReduce | Reduce | ReduceScatter | ReduceScatterTensor | AllReduceCoalesced)
    }
}

/// Every point.
pub fn whole() -> Vec<Case> {
    let mut cases = Vec::new();
    for collective in COLLECTIVES {
        let ops: Vec<Option<ReduceOp>> =
            if collective.reduces() { OPS.map(Some).to_vec() } else { vec![None] };
        for op in ops {
            for kind in KINDS {
                for layout in LAYOUTS {
                    for size in SIZES {
                        for form in FORMS {
                            cases.push(Case { collective, kind, op, layout, size, form });
                        }
                    }
                }
            }
        }
    }
    cases
}

/// So many of them that every pair of values of two factors occurs: each case is taken if it brings a
/// pair that none before it had.
pub fn pairwise() -> Vec<Case> {
    let mut seen = std::collections::HashSet::new();
    let mut whole = whole();
    // A fixed shuffle, so that the first cases do not all begin alike.
    let mut state = 1u64;
    for i in (1..whole.len()).rev() {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        whole.swap(i, (state >> 33) as usize % (i + 1));
    }
    whole.retain(|case| {
        let Case { collective, kind, op, layout, size, form } = case;
        let factors = [
            format!("{collective:?}"),
            format!("{kind:?}"),
            format!("{op:?}"),
            format!("{layout:?}"),
            format!("{size:?}"),
            format!("{form:?}"),
        ];
        let mut fresh = false;
        for i in 0..factors.len() {
            for j in 0..i {
                fresh |= seen.insert((i, j, factors[i].clone(), factors[j].clone()));
            }
        }
        fresh
    });
    whole
}

/// A tensor as a view of a larger one, whose other elements must stay as they are.
struct Placed {
    base: Tensor,
    view: Tensor,
}

fn place(elements: &Tensor, layout: Layout) -> Placed {
    let (shape, n) = (elements.size(), elements.numel() as i64);
    let filled = |shape: &[i64]| Tensor::ones(shape, (elements.kind(), elements.device()));
    let (base, mut view) = match layout {
        Layout::Contiguous => {
            let base = filled(&shape);
            (base.shallow_clone(), base)
        }
        Layout::Offset => {
            let base = filled(&[n + 5]);
            (base.shallow_clone(), base.narrow(0, 3, n).view(&shape[..]))
        }
        Layout::Strided => {
            let mut wide = shape.clone();
            let last = wide.len() - 1;
            wide[last] *= 2;
            let base = filled(&wide);
            (base.shallow_clone(), base.slice(last as i64, 0, wide[last], 2))
        }
        Layout::Transposed => {
            let mut turned = shape.clone();
            turned.reverse();
            let base = filled(&turned);
            let order: Vec<i64> = (0..shape.len() as i64).rev().collect();
            (base.shallow_clone(), base.permute(order))
        }
    };
    view.copy_(elements);
    Placed { base, view }
}

/// What a backend promises beside right results.
struct Promises {
    /// Every operation on every kind; others may refuse some, by name.
    complete: bool,
    /// Asynchronous calls end in the order in which they began.
    ordered: bool,
}

fn promises(group: &ProcessGroup) -> Promises {
    let own = !["gloo", "nccl"].contains(&group.backend_name().as_str());
    Promises { complete: own, ordered: own }
}

/// What one rank knows while it runs a case.
struct Setting<'a> {
    group: &'a ProcessGroup,
    case: Case,
    rank: i64,
    size: i64,
}

/// Runs a case on this rank: what went wrong, if anything did. `Err` is a failure that leaves the
/// group unusable.
pub fn run(case: Case, group: &ProcessGroup) -> Result<std::result::Result<(), String>> {
    let backend = promises(group);
    let outcome = attempt(case, group);
    if let Err(Error::Unsupported { what, .. }) = &outcome
        && !backend.complete
        && what.contains(&format!("{:?}", case.kind))
    {
        return Ok(Ok(()));
    }
    if let Some(op) = case.op
        && !model::means_something(op, case.kind)
    {
        return Ok(match outcome {
            Err(Error::Unsupported { what, .. })
                if what.contains(&op.to_string()) && what.contains(&format!("{:?}", case.kind)) =>
            {
                Ok(())
            }
            Err(other) => return Err(other),
            Ok(_) => Err("was not refused".to_owned()),
        });
    }
    outcome
}

/// [`run`], with whatever the backend refuses as the error that it is.
pub fn attempt(case: Case, group: &ProcessGroup) -> Result<std::result::Result<(), String>> {
    Setting { group, case, rank: group.rank() as i64, size: group.size() as i64 }.run()
}

impl Setting<'_> {
    fn shape(&self, rows_more: i64) -> Vec<i64> {
        match self.case.size {
            Size::Empty => vec![0, 3],
            Size::One if rows_more == 0 => vec![1, 1],
            Size::One => vec![1 + rows_more, 1],
            Size::Odd => vec![7 + rows_more, 3],
            Size::Large => vec![129 + rows_more, 65],
        }
    }

    fn values(&self, shape: &[i64], seed: i64) -> Tensor {
        values(shape, self.case.kind, seed)
    }

    fn place(&self, elements: &Tensor) -> Placed {
        place(elements, self.case.layout)
    }

    /// Room of this shape, filled with something.
    fn room(&self, shape: &[i64]) -> Placed {
        self.place(&self.values(shape, 1000))
    }

    /// One of the forms.
    fn call(
        &self,
        blocking: impl FnOnce() -> Result<()>,
        launch: impl FnOnce() -> Result<Work>,
    ) -> Result<()> {
        match self.case.form {
            Form::Blocking => blocking(),
            Form::Awaited => launch()?.wait(),
            Form::Dropped => {
                drop(launch()?);
                self.group.barrier()
            }
        }
    }

    /// Every element where it should be, and nothing else touched.
    fn check(&self, what: &str, placed: &Placed, expected: &Tensor) -> std::result::Result<(), String> {
        let wanted = self.place(expected);
        let mut patience =
            if self.case.form == Form::Dropped && !promises(self.group).ordered { 6000 } else { 0 };
        loop {
            if same(&placed.base, &wanted.base) {
                return Ok(());
            }
            if patience == 0 {
                break;
            }
            patience -= 1;
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Err(format!(
            "rank {}: {what} is {} instead of {}",
            self.rank,
            placed.view.contiguous().view([-1]),
            expected.contiguous().view([-1])
        ))
    }

    fn check_all(
        &self,
        what: &str,
        placed: &[Placed],
        expected: &[Tensor],
    ) -> std::result::Result<(), String> {
        placed.iter().zip(expected).try_for_each(|(p, e)| self.check(what, p, e))
    }

    fn run(&self) -> Result<std::result::Result<(), String>> {
        let op = self.case.op.unwrap_or_default();
        let group = self.group;
        // The root moves about, so that it is not always rank 0.
        let root = (self.size - 1) / 2;
        let (me, n) = (self.rank, self.size);
        let ranks = 0..n;
        let shape = self.shape(0);
        let mine = self.values(&shape, me);
        let all: Vec<Tensor> = ranks.clone().map(|r| self.values(&shape, r)).collect();
        let list = |tensors: &[Placed]| tensors.iter().map(|p| p.view.shallow_clone()).collect::<Vec<_>>();
        Ok(match self.case.collective {
            Collective::AllReduce => {
                let t = self.place(&mine);
                let mut tensor = t.view.shallow_clone();
                self.call(|| group.all_reduce(&mut tensor, op), || group.all_reduce_async(&t.view, op))?;
                self.check("the tensor", &t, &model::reduce(op, &all))
            }
            Collective::Reduce => {
                let t = self.place(&mine);
                let mut tensor = t.view.shallow_clone();
                let dst = root as usize;
                self.call(|| group.reduce(&mut tensor, dst, op), || group.reduce_async(&t.view, dst, op))?;
                self.check("the tensor", &t, &if me == root { model::reduce(op, &all) } else { mine })
            }
            Collective::ReduceScatter => {
                // Parts of different sizes: part r has r rows more.
                let part = |from: i64, to: i64| self.values(&self.shape(to), from * 10 + to);
                let inputs: Vec<Placed> = ranks.clone().map(|to| self.place(&part(me, to))).collect();
                let out = self.room(&self.shape(me));
                let (inputs, mut output) = (list(&inputs), out.view.shallow_clone());
                self.call(
                    || group.reduce_scatter(&mut output, &inputs, op),
                    || group.reduce_scatter_async(&out.view, &inputs, op),
                )?;
                let parts: Vec<Tensor> = ranks.map(|from| part(from, me)).collect();
                self.check("the output", &out, &model::reduce(op, &parts))
            }
            Collective::ReduceScatterTensor => {
                let whole = |from: i64| self.values(&[n * shape[0], shape[1]], from);
                let (input, out) = (self.place(&whole(me)), self.room(&shape));
                let mut output = out.view.shallow_clone();
                self.call(
                    || group.reduce_scatter_tensor(&mut output, &input.view, op),
                    || group.reduce_scatter_tensor_async(&out.view, &input.view, op),
                )?;
                let parts: Vec<Tensor> =
                    ranks.map(|from| whole(from).narrow(0, me * shape[0], shape[0])).collect();
                self.check("the output", &out, &model::reduce(op, &parts))
            }
            Collective::AllReduceCoalesced => {
                let shapes = [self.shape(0), self.shape(1), vec![2, 2]];
                let tensors = |r: i64| shapes.each_ref().map(|s| self.values(s, r));
                let placed = tensors(me).map(|t| self.place(&t));
                let (mut blocking, launched) = (list(&placed), list(&placed));
                self.call(
                    || group.all_reduce_coalesced(&mut blocking, op),
                    || group.all_reduce_coalesced_async(&launched, op),
                )?;
                let expected: Vec<Tensor> = (0..shapes.len())
                    .map(|i| {
                        model::reduce(
                            op,
                            &ranks.clone().map(|r| tensors(r)[i].shallow_clone()).collect::<Vec<_>>(),
                        )
                    })
                    .collect();
                self.check_all("a tensor", &placed, &expected)
            }
            Collective::Broadcast => {
                let t = self.place(&mine);
                let mut tensor = t.view.shallow_clone();
                let src = root as usize;
                self.call(|| group.broadcast(&mut tensor, src), || group.broadcast_async(&t.view, src))?;
                self.check("the tensor", &t, &all[src])
            }
            Collective::AllGather => {
                let theirs: Vec<Tensor> = ranks.map(|r| self.values(&self.shape(r), r)).collect();
                let outs: Vec<Placed> = theirs.iter().map(|t| self.room(&t.size())).collect();
                let input = self.place(&theirs[me as usize]);
                let (mut blocking, launched) = (list(&outs), list(&outs));
                self.call(
                    || group.all_gather(&mut blocking, &input.view),
                    || group.all_gather_async(&launched, &input.view),
                )?;
                self.check_all("an output", &outs, &theirs)
            }
            Collective::AllGatherUneven => {
                let theirs: Vec<Tensor> = ranks.map(|r| self.values(&self.shape(r), r)).collect();
                let input = self.place(&theirs[me as usize]);
                let got = group.all_gather_uneven(&input.view)?;
                let right = got.len() == theirs.len() && got.iter().zip(&theirs).all(|(a, b)| same(a, b));
                if right { Ok(()) } else { Err("the tensors are not the ranks' own".to_owned()) }
            }
            Collective::AllGatherIntoTensor | Collective::AllGatherStacked => {
                let stacked = self.case.collective == Collective::AllGatherStacked;
                let expected = if stacked { Tensor::stack(&all, 0) } else { Tensor::cat(&all, 0) };
                let (input, out) = (self.place(&mine), self.room(&expected.size()));
                let mut output = out.view.shallow_clone();
                self.call(
                    || group.all_gather_into_tensor(&mut output, &input.view),
                    || group.all_gather_into_tensor_async(&out.view, &input.view),
                )?;
                self.check("the output", &out, &expected)
            }
            Collective::Gather => {
                let theirs: Vec<Tensor> = ranks.map(|r| self.values(&self.shape(r), r)).collect();
                let outs: Vec<Placed> = if me == root {
                    theirs.iter().map(|t| self.room(&t.size())).collect()
                } else {
                    Vec::new()
                };
                let input = self.place(&theirs[me as usize]);
                let (mut blocking, launched) = (list(&outs), list(&outs));
                let dst = root as usize;
                self.call(
                    || group.gather((me == root).then_some(&mut blocking[..]), &input.view, dst),
                    || group.gather_async((me == root).then_some(&launched[..]), &input.view, dst),
                )?;
                self.check_all("an output", &outs, &theirs)
            }
            Collective::Scatter => {
                let parts: Vec<Tensor> = ranks.map(|r| self.values(&self.shape(r), r + 50)).collect();
                let inputs: Vec<Placed> = parts.iter().map(|t| self.place(t)).collect();
                let inputs = list(&inputs);
                let inputs = (me == root).then_some(&inputs[..]);
                let out = self.room(&self.shape(me));
                let mut output = out.view.shallow_clone();
                let src = root as usize;
                self.call(
                    || group.scatter(&mut output, inputs, src),
                    || group.scatter_async(&out.view, inputs, src),
                )?;
                self.check("the output", &out, &parts[me as usize])
            }
            Collective::AllToAll => {
                let part = |from: i64, to: i64| self.values(&self.shape(from + to), from * 10 + to);
                let inputs: Vec<Placed> = ranks.clone().map(|to| self.place(&part(me, to))).collect();
                let outs: Vec<Placed> = ranks.clone().map(|from| self.room(&self.shape(from + me))).collect();
                let (inputs, mut blocking, launched) = (list(&inputs), list(&outs), list(&outs));
                self.call(
                    || group.all_to_all(&mut blocking, &inputs),
                    || group.all_to_all_async(&launched, &inputs),
                )?;
                self.check_all("an output", &outs, &ranks.map(|from| part(from, me)).collect::<Vec<_>>())
            }
            Collective::AllToAllSingle | Collective::AllToAllSplits => {
                let splits = self.case.collective == Collective::AllToAllSplits;
                // Rank a sends rank b as many rows as this; some send none.
                let rows = |from: i64, to: i64| match self.case.size {
                    Size::Empty => 0,
                    _ if splits => (from + 2 * to) % 3 * shape[0],
                    _ => shape[0],
                };
                let part = |from: i64, to: i64| self.values(&[rows(from, to), shape[1]], from * 10 + to);
                let sent: Vec<i64> = ranks.clone().map(|to| rows(me, to)).collect();
                let received: Vec<i64> = ranks.clone().map(|from| rows(from, me)).collect();
                let input = Tensor::cat(&ranks.clone().map(|to| part(me, to)).collect::<Vec<_>>(), 0);
                let expected = Tensor::cat(&ranks.map(|from| part(from, me)).collect::<Vec<_>>(), 0);
                let (input, out) = (self.place(&input), self.room(&expected.size()));
                let mut output = out.view.shallow_clone();
                let (sent, received) = (splits.then_some(&sent[..]), splits.then_some(&received[..]));
                self.call(
                    || group.all_to_all_single(&mut output, &input.view, received, sent),
                    || group.all_to_all_single_async(&out.view, &input.view, received, sent),
                )?;
                self.check("the output", &out, &expected)
            }
            Collective::Ring => {
                let (next, before) = ((me + 1) % n, (me + n - 1) % n);
                let (input, out) = (self.place(&mine), self.room(&shape));
                let receive = || group.irecv(&out.view, before as usize, 3);
                let send = || group.isend(&input.view, next as usize, 3);
                // NCCL does one after the other: somebody must begin with the other side of what a neighbour begins with.
                let (sent, received) = if group.backend_name() == "nccl" && me % 2 == 0 {
                    let sent = send()?;
                    (sent, receive()?)
                } else {
                    let received = receive()?;
                    (send()?, received)
                };
                if self.case.form == Form::Dropped {
                    drop(sent);
                } else {
                    sent.wait()?;
                }
                received.wait()?;
                self.check("the output", &out, &all[before as usize])
            }
            Collective::AllPairs => {
                let part = |from: i64, to: i64| self.values(&shape, from * 10 + to);
                let outs: Vec<Placed> = ranks.clone().map(|_| self.room(&shape)).collect();
                let mut ops: Vec<P2pOp> = ranks
                    .clone()
                    .map(|to| P2pOp::send(&self.place(&part(me, to)).view, to as usize, 5))
                    .collect();
                ops.extend(
                    ranks.clone().map(|from| P2pOp::recv(&outs[from as usize].view, from as usize, 5)),
                );
                if me % 2 == 0 {
                    ops.reverse();
                }
                for work in group.batch_isend_irecv(ops)? {
                    work.wait()?;
                }
                self.check_all("an output", &outs, &ranks.map(|from| part(from, me)).collect::<Vec<_>>())
            }
        })
    }
}
