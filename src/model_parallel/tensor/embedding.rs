//! An embedding split by vocabulary.

use std::borrow::Borrow;

use tch::nn::{self, Init};
use tch::{Kind, Tensor};

use super::initial::{Draw, draw};
use super::split::Split;
use super::{ParallelLinearConfig, check_features, check_positive, layout, linear, sequence_dim};
use crate::functional::{all_gather_even, copy_to_group, reduce_from_group, reduce_scatter_even};
use crate::model_parallel::escape::or_raise;
use crate::{Error, ProcessGroup, Result};

/// An embedding whose vocabulary is split: each rank holds some rows of the `[vocabulary, width]` weight, looks up
/// the tokens that it has, and the results are summed.
///
/// Of the configuration only `sequence_parallel` means something here: the output is this rank's part of the
/// sequence, and [`logits`](Self::logits) takes such a part.
///
/// ```
/// use tch::{Device, Tensor, nn, nn::Module};
/// use tch_distributed::model_parallel::tensor::{ParallelLinearConfig, VocabParallelEmbedding};
/// use tch_distributed::testing;
///
/// testing::run_threads(2, |group| {
///     let vs = nn::VarStore::new(Device::Cpu);
///     let config = ParallelLinearConfig::default();
///     let table = VocabParallelEmbedding::new(&vs.root(), 10, 4, config, &group).unwrap();
///     assert_eq!(table.ws.size(), [5, 4]);
///     assert_eq!(table.forward(&Tensor::from_slice(&[0_i64, 9, 3])).size(), [3, 4]);
/// });
/// ```
#[derive(Debug)]
pub struct VocabParallelEmbedding {
    /// This rank's rows of the weight: `[vocabulary share, width]`.
    pub ws: Tensor,
    first: i64,
    vocabulary: i64,
    sequence_parallel: bool,
    group: ProcessGroup,
}

impl VocabParallelEmbedding {
    /// An embedding with the initial weight that [`tch::nn::embedding`] would draw from the same seed.
    ///
    /// # Errors
    /// `InvalidArgument` for a size below one; those of the group's collectives.
    pub fn new<'a>(
        path: impl Borrow<nn::Path<'a>>,
        vocabulary: i64,
        width: i64,
        config: ParallelLinearConfig,
        group: &ProcessGroup,
    ) -> Result<Self> {
        let standard_normal = Init::Randn { mean: 0.0, stdev: 1.0 };
        Self::with_init(path, vocabulary, width, standard_normal, config, group)
    }

    /// The same with another initial weight, drawn as the unsplit layer would draw it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_init<'a>(
        path: impl Borrow<nn::Path<'a>>,
        vocabulary: i64,
        width: i64,
        ws_init: Init,
        config: ParallelLinearConfig,
        group: &ProcessGroup,
    ) -> Result<Self> {
        let path = path.borrow();
        check_positive("vocabulary", vocabulary)?;
        check_positive("width", width)?;
        let split = Split::new(0, &[vocabulary], group.size());
        let draws = [Draw { init: ws_init, shape: vec![vocabulary, width], split: Some(split.clone()) }];
        let drawn = draw(&draws, path.kind(), path.device(), group)?;
        let ws = drawn.into_iter().next().ok_or_else(|| Error::invalid("path", "no weight was drawn"))?;
        Ok(Self::register(path, ws, &split, config, group))
    }

    /// An embedding whose shard is taken from the full weight `[vocabulary, width]` that every rank has.
    ///
    /// # Errors
    /// `ShapeMismatch` for a weight of another number of dimensions.
    pub fn from_full<'a>(
        path: impl Borrow<nn::Path<'a>>,
        weight: &Tensor,
        config: ParallelLinearConfig,
        group: &ProcessGroup,
    ) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let path = path.borrow();
        let (vocabulary, _) = linear::weight_size(weight)?;
        let split = Split::new(0, &[vocabulary], group.size());
        let ws = split.take(&weight.f_to_device(path.device())?, group.rank())?;
        Ok(Self::register(path, ws, &split, config, group))
    }

    fn register(
        path: &nn::Path<'_>,
        ws: Tensor,
        split: &Split,
        config: ParallelLinearConfig,
        group: &ProcessGroup,
    ) -> Self {
        let ws = layout::add_shard(path, "weight", ws, split);
        let first = split.ranges(group.rank())[0].start;
        Self {
            ws,
            first,
            vocabulary: split.full(),
            sequence_parallel: config.sequence_parallel,
            group: group.clone(),
        }
    }

    /// The same table once more, with the same weight: for a head tied to an embedding on one rank.
    pub fn share(&self) -> Self {
        Self { ws: self.ws.shallow_clone(), group: self.group.clone(), ..*self }
    }

    /// The rows of the tokens in `ids` (any shape, the same on every rank): `[.., width]`.
    ///
    /// # Errors
    /// `KindMismatch` for ids that are no integers, `InvalidArgument` for one outside the vocabulary; those of the
    /// group's collectives.
    pub fn f_forward(&self, ids: &Tensor) -> Result<Tensor> {
        check_ids(ids, self.vocabulary, "ids")?;
        let own = self.ws.size()[0];
        let local = ids.f_sub_scalar(self.first)?;
        let elsewhere = local.f_lt(0)?.f_logical_or(&local.f_ge(own)?)?;
        // A rank with no rows at all (more ranks than tokens) still takes part in the sum.
        let partial = if own == 0 {
            let shape = [ids.size(), vec![self.ws.size()[1]]].concat();
            let zeros = Tensor::f_zeros(shape, (self.ws.kind(), self.ws.device()))?;
            zeros.f_add(&self.ws.f_sum(self.ws.kind())?)?
        } else {
            let local = local.f_masked_fill(&elsewhere, 0)?;
            let rows = Tensor::f_embedding(&self.ws, &local, -1, false, false)?;
            rows.f_masked_fill(&elsewhere.f_unsqueeze(-1)?, 0.0)?
        };
        match self.sequence_parallel {
            true => reduce_scatter_even(&partial, sequence_dim(&partial)?, &self.group),
            false => reduce_from_group(&partial, &self.group),
        }
    }

    /// The tied head: this rank's logits `[.., vocabulary share]` of hidden states `[.., width]`, for
    /// [`vocab_parallel_cross_entropy`](super::vocab_parallel_cross_entropy).
    ///
    /// # Errors
    /// `ShapeMismatch` for hidden states of another width; those of the group's collectives.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        check_features(hidden, self.ws.size()[1])?;
        let hidden = match self.sequence_parallel {
            true => all_gather_even(hidden, sequence_dim(hidden)?, &self.group)?,
            false => copy_to_group(hidden, &self.group)?,
        };
        Ok(hidden.f_linear(&self.ws, None::<&Tensor>)?)
    }
}

impl nn::Module for VocabParallelEmbedding {
    fn forward(&self, ids: &Tensor) -> Tensor {
        or_raise(self.f_forward(ids))
    }
}

/// Token numbers must be integers below `vocabulary`.
pub(super) fn check_ids(ids: &Tensor, vocabulary: i64, argument: &'static str) -> Result<()> {
    if !matches!(ids.kind(), Kind::Int64 | Kind::Int) {
        return Err(Error::KindMismatch {
            argument,
            expected: "Int64 or Int".to_owned(),
            got: format!("{:?}", ids.kind()),
        });
    }
    if ids.numel() == 0 {
        return Ok(());
    }
    let (least, most) = (ids.f_min()?.f_int64_value(&[])?, ids.f_max()?.f_int64_value(&[])?);
    if least >= 0 && most < vocabulary {
        return Ok(());
    }
    let wrong = if least < 0 { least } else { most };
    Err(Error::invalid(argument, format!("{wrong} is outside the vocabulary of {vocabulary}")))
}
