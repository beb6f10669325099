//! What is measured: a collective on tensors of one kind and size.

use std::fmt;
use std::str::FromStr;

use tch::{Device, Kind, Tensor};
use tch_distributed as dist;

use dist::{ProcessGroup, ReduceOp, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Collective {
    AllReduce,
    Reduce,
    Broadcast,
    AllGather,
    Gather,
    Scatter,
    ReduceScatter,
    AllToAll,
    SendRecv,
    Barrier,
}

pub(crate) const COLLECTIVES: [Collective; 10] = [
    Collective::AllReduce,
    Collective::Reduce,
    Collective::Broadcast,
    Collective::AllGather,
    Collective::Gather,
    Collective::Scatter,
    Collective::ReduceScatter,
    Collective::AllToAll,
    Collective::SendRecv,
    Collective::Barrier,
];

impl Collective {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::Reduce => "reduce",
            Self::Broadcast => "broadcast",
            Self::AllGather => "all_gather",
            Self::Gather => "gather",
            Self::Scatter => "scatter",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllToAll => "all_to_all",
            Self::SendRecv => "send_recv",
            Self::Barrier => "barrier",
        }
    }

    /// Bus bandwidth over algorithm bandwidth, as nccl-tests define it.
    pub(crate) fn bus_factor(self, world: usize) -> f64 {
        let n = world as f64;
        match self {
            Self::AllReduce => 2.0 * (n - 1.0) / n,
            Self::AllGather | Self::ReduceScatter | Self::AllToAll | Self::Gather | Self::Scatter => {
                (n - 1.0) / n
            }
            Self::Broadcast | Self::Reduce | Self::SendRecv => 1.0,
            Self::Barrier => 0.0,
        }
    }
}

impl FromStr for Collective {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        COLLECTIVES.into_iter().find(|c| c.name() == name).ok_or_else(|| {
            format!("{name:?} is no collective: known are {}", COLLECTIVES.map(Self::name).join(", "))
        })
    }
}

/// `bytes` is the larger of a rank's buffers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Case {
    pub(crate) collective: Collective,
    pub(crate) bytes: usize,
    pub(crate) kind: Kind,
}

pub(crate) const KINDS: [(&str, Kind); 6] = [
    ("f32", Kind::Float),
    ("f64", Kind::Double),
    ("f16", Kind::Half),
    ("bf16", Kind::BFloat16),
    ("i32", Kind::Int),
    ("u8", Kind::Uint8),
];

pub(crate) fn kind_name(kind: Kind) -> &'static str {
    KINDS.iter().find(|(_, k)| *k == kind).map_or("?", |(name, _)| name)
}

impl Case {
    pub(crate) fn count(&self) -> usize {
        self.bytes / self.kind.elt_size_in_bytes()
    }

    /// As a crew is told.
    pub(crate) fn words(&self) -> String {
        format!("{} {} {}", self.collective.name(), self.bytes, kind_name(self.kind))
    }

    pub(crate) fn parse(words: &str) -> Result<Self, String> {
        let mut words = words.split(' ');
        let (collective, bytes, kind) = (words.next(), words.next(), words.next());
        let kind = KINDS.iter().find(|(name, _)| Some(*name) == kind).ok_or("no kind")?.1;
        Ok(Self {
            collective: collective.unwrap_or_default().parse()?,
            bytes: bytes.and_then(|b| b.parse().ok()).ok_or("no size")?,
            kind,
        })
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes of {}", self.collective.name(), self.bytes, kind_name(self.kind))
    }
}

/// The tensors of a case on one rank, to be used again and again.
pub(crate) struct Tensors {
    case: Case,
    world: usize,
    /// The larger buffer.
    large: Tensor,
    /// One rank's part of it, or another as large.
    small: Tensor,
    /// Parts of the larger, where a list is wanted.
    parts: Vec<Tensor>,
}

impl Tensors {
    /// In ordinary memory, or where the engine allocates it.
    pub(crate) fn new(case: Case, group: &ProcessGroup, allocated: bool) -> Result<Self> {
        let world = group.size();
        let divided = matches!(
            case.collective,
            Collective::AllGather | Collective::Gather | Collective::Scatter | Collective::ReduceScatter
        );
        let parted = divided || case.collective == Collective::AllToAll;
        let count = case.count();
        let count = (if parted { count.next_multiple_of(world) } else { count }) as i64;
        let small = match case.collective {
            Collective::Reduce | Collective::Broadcast | Collective::AllReduce | Collective::Barrier => 0,
            _ if divided => count / world as i64,
            _ => count,
        };
        let options = (case.kind, Device::Cpu);
        let zeros = |n: i64| -> Result<Tensor> {
            Ok(match allocated {
                true => group.allocate_tensor(&[n], options)?.zero_(),
                false => Tensor::zeros([n], options),
            })
        };
        let large = zeros(count)?;
        let parts = if parted { large.split(count / world as i64, 0) } else { Vec::new() };
        Ok(Self { case, world, large, small: zeros(small)?, parts })
    }

    /// Runs the collective once.
    pub(crate) fn run(&mut self, group: &ProcessGroup) -> Result<()> {
        let (rank, world) = (group.rank(), self.world);
        match self.case.collective {
            Collective::AllReduce => group.all_reduce(&mut self.large, ReduceOp::Sum),
            Collective::Reduce => group.reduce(&mut self.large, 0, ReduceOp::Sum),
            Collective::Broadcast => group.broadcast(&mut self.large, 0),
            Collective::AllGather => group.all_gather_into_tensor(&mut self.large, &self.small),
            Collective::Gather => group.gather((rank == 0).then_some(&mut self.parts[..]), &self.small, 0),
            Collective::Scatter => group.scatter(&mut self.small, (rank == 0).then_some(&self.parts), 0),
            Collective::ReduceScatter => {
                group.reduce_scatter_tensor(&mut self.small, &self.large, ReduceOp::Sum)
            }
            Collective::AllToAll => group.all_to_all_single(&mut self.small, &self.large, None, None),
            Collective::SendRecv if world == 1 => Ok(()),
            Collective::SendRecv => match rank {
                0 => group.send(&self.large, 1, 0),
                1 => group.recv(&mut self.small, 0, 0).map(|_| ()),
                _ => Ok(()),
            },
            Collective::Barrier => group.barrier(),
        }
    }

    /// Runs it once on data whose result is known; false where the result is another.
    pub(crate) fn verify(&mut self, group: &ProcessGroup) -> Result<bool> {
        let (rank, world) = (group.rank(), self.world as i64);
        let part = self.large.numel() as i64 / world.max(1);
        // Rank r has r + 1 everywhere, and r + 1 + s in the part for rank s where it is cut.
        let kind = self.case.kind;
        let by_part = |base: i64| {
            let parts: Vec<Tensor> =
                (0..world).map(|s| Tensor::full([part], base + s, (kind, Device::Cpu))).collect();
            Tensor::cat(&parts, 0)
        };
        let own = rank as i64 + 1;
        let sum = world * (world + 1) / 2;
        let filled = |t: &Tensor, v: i64| t.equal(&t.full_like(v));
        let _ = self.small.fill_(own);
        match self.case.collective {
            Collective::Scatter | Collective::ReduceScatter | Collective::AllToAll => {
                self.large.copy_(&by_part(own));
            }
            _ => {
                let _ = self.large.fill_(own);
            }
        }
        self.run(group)?;
        let right = match self.case.collective {
            Collective::AllReduce => filled(&self.large, sum),
            Collective::Reduce => rank != 0 || filled(&self.large, sum),
            Collective::Broadcast => filled(&self.large, 1),
            Collective::AllGather => self.large.equal(&by_part(1)),
            Collective::Gather => rank != 0 || self.large.equal(&by_part(1)),
            Collective::Scatter => filled(&self.small, 1 + rank as i64),
            Collective::ReduceScatter => filled(&self.small, sum + world * rank as i64),
            Collective::AllToAll => self.small.equal(&by_part(1 + rank as i64)),
            Collective::SendRecv => rank != 1 || filled(&self.small, 1),
            Collective::Barrier => true,
        };
        let _ = self.large.zero_();
        let _ = self.small.zero_();
        Ok(right)
    }
}
