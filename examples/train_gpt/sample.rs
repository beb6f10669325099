//! Text written by the model.

use tch::{Kind, Tensor};
use tch_distributed::functional::gather_from_group;
use tch_distributed::model_parallel::pipeline::Pipeline;
use tch_distributed::random::Generator;
use tch_distributed::{ProcessGroup, Result};

use crate::gpt::Text;
use crate::{Args, Outcome};

/// Lets the whole pipeline go on with a beginning, one token at a time. Every rank of the model calls it; the rank
/// with the last stage and the first share of the logits chooses.
pub(crate) fn write(
    pipeline: &Pipeline,
    text: &Text,
    args: &Args,
    model: &ProcessGroup,
    tp: &ProcessGroup,
) -> Outcome<Option<String>> {
    let chooser = model.size() - tp.size();
    let dice = Generator::new(7)?;
    let (prompt, _) = text.batch(0, 1, 16);
    let mut written = Vec::<i64>::try_from(prompt.reshape([-1]))?;
    while written.len() < args.sample {
        // The last tokens, filled up to the context; what is behind a token does not matter to it.
        let seen = written.len().min(args.context as usize);
        let mut window = written[written.len() - seen..].to_vec();
        window.resize(args.context as usize, 0);
        let rows = args.micro_batches as i64;
        let window = Tensor::from_slice(&window).unsqueeze(0).repeat([rows, 1]);
        let outputs = pipeline.forward(Some(&window))?;
        let mut next = Tensor::zeros([1], (Kind::Int64, window.device()));
        if let Some(logits) = outputs {
            next = choose(&logits[0].get(0).get(seen as i64 - 1), &dice, tp)?;
        }
        model.broadcast(&mut next, chooser)?;
        written.push(next.int64_value(&[0]));
    }
    let bytes: Vec<u8> = written.iter().map(|&b| b as u8).collect();
    Ok((model.rank() == chooser).then(|| String::from_utf8_lossy(&bytes).into_owned()))
}

/// A token by its probability, a little sharpened.
fn choose(logits: &Tensor, dice: &Generator, tp: &ProcessGroup) -> Result<Tensor> {
    let logits = gather_from_group(&logits.f_detach()?, -1, tp)?;
    let cumulative = (logits * 1.25).f_softmax(-1, Kind::Double)?.f_cumsum(-1, Kind::Double)?;
    let die = dice.rand(&[1], Kind::Double)?;
    Ok(cumulative
        .f_lt_tensor(&die)?
        .f_sum(Kind::Int64)?
        .f_clamp(0, cumulative.numel() as i64 - 1)?
        .f_reshape([1])?)
}
