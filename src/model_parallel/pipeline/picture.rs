//! Timelines drawn as text and as SVG.

use std::fmt::{self, Write as _};

use super::{Pass, Slot, Timeline};

impl Timeline {
    /// What is written on a slot: the pass and the micro-batch, with the stage where a rank has several.
    fn label(&self, slot: &Slot) -> String {
        let pass = match slot.action.pass {
            Pass::Forward => 'F',
            Pass::Backward => 'B',
            Pass::BackwardInput => 'I',
            Pass::BackwardWeight => 'W',
        };
        if self.stages > self.ranks.len() {
            format!("{pass}{}:{}", slot.action.stage, slot.action.micro_batch)
        } else {
            format!("{pass}{}", slot.action.micro_batch)
        }
    }

    fn first_start(&self) -> f64 {
        let first = self.ranks.iter().flatten().map(|s| s.start).fold(f64::INFINITY, f64::min);
        if first.is_finite() { first } else { 0.0 }
    }

    /// The picture as SVG: one row a rank over an axis of time, forwards blue, backwards green, gradients of weights
    /// orange. What each box is shows when the pointer is on it.
    pub fn svg(&self) -> String {
        let bottom = TOP + ROW * self.ranks.len() as f64;
        let (width, height) = (LEFT + WIDTH + 20.0, bottom + 48.0);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<rect class=\"paper\" width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"8\" y=\"22\" font-size=\"15\">{}: bubble {:.1} %</text>\n",
            self.name,
            100.0 * self.bubble_share()
        );
        self.legend(&mut svg);
        for (rank, slots) in self.ranks.iter().enumerate() {
            let y = TOP + ROW * rank as f64;
            let _ = writeln!(svg, "<text x=\"8\" y=\"{}\">rank {rank}</text>", y + 19.0);
            slots.iter().for_each(|slot| self.slot(&mut svg, slot, y));
        }
        self.axis(&mut svg, bottom);
        svg.push_str("</svg>\n");
        svg
    }

    /// Where a time is in the picture.
    fn x(&self, time: f64) -> f64 {
        LEFT + (time - self.first_start()) / self.span().max(f64::MIN_POSITIVE) * WIDTH
    }

    fn slot(&self, svg: &mut String, slot: &Slot, y: f64) {
        let (x, width) = (self.x(slot.start), self.x(slot.end) - self.x(slot.start));
        let (fill, label) = (colour(slot.action.pass), self.label(slot));
        let _ = write!(
            svg,
            "<rect x=\"{x:.2}\" y=\"{y}\" width=\"{width:.2}\" height=\"28\" fill=\"{fill}\" stroke=\"#444\">\
             <title>{}</title></rect>",
            slot.action
        );
        if width > 9.0 * label.len() as f64 {
            let _ = write!(svg, "<text x=\"{:.2}\" y=\"{}\">{label}</text>", x + 3.0, y + 19.0);
        }
        svg.push('\n');
    }

    /// What the colours mean, of those that occur.
    fn legend(&self, svg: &mut String) {
        let known = [
            (Pass::Forward, "forward"),
            (Pass::Backward, "backward"),
            (Pass::BackwardInput, "gradients of inputs"),
            (Pass::BackwardWeight, "gradients of weights"),
        ];
        let occurs = |pass| self.ranks.iter().flatten().any(|s| s.action.pass == pass);
        let mut x = LEFT + WIDTH;
        for (pass, name) in known.into_iter().rev().filter(|(pass, _)| occurs(*pass)) {
            x -= 8.0 * name.len() as f64 + 30.0;
            let _ = writeln!(
                svg,
                "<path d=\"M{x:.0} 10h14v14h-14z\" fill=\"{}\" stroke=\"#444\"/><text x=\"{:.0}\" y=\"22\">{name}</text>",
                colour(pass),
                x + 20.0
            );
        }
    }

    /// Ticks at round times, and what they count.
    fn axis(&self, svg: &mut String, y: f64) {
        let (scale, unit) =
            if self.measured { (1e3, "time (ms)") } else { (1.0, "time (units of the costs)") };
        let (first, step) = (self.first_start(), round_step(self.span() * scale / 8.0));
        let end = LEFT + WIDTH;
        let _ = writeln!(svg, "<path d=\"M{LEFT} {y}H{end}\" stroke=\"#444\"/>");
        for tick in (0..=12).map(|i| f64::from(i) * step).take_while(|t| *t <= self.span() * scale + 1e-9) {
            let x = self.x(first + tick / scale);
            let digits = usize::try_from(-step.log10().floor() as i64).unwrap_or(0);
            let _ = writeln!(
                svg,
                "<path d=\"M{x:.2} {y}v5\" stroke=\"#444\"/><text x=\"{x:.2}\" y=\"{}\" \
                 text-anchor=\"middle\">{tick:.digits$}</text>",
                y + 19.0
            );
        }
        let middle = LEFT + WIDTH / 2.0;
        let _ = writeln!(svg, "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{unit}</text>", y + 38.0);
    }
}

const WIDTH: f64 = 1200.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 40.0;
const ROW: f64 = 34.0;

fn colour(pass: Pass) -> &'static str {
    match pass {
        Pass::Forward => "#8fb8de",
        Pass::Backward | Pass::BackwardInput => "#9fd3a4",
        Pass::BackwardWeight => "#f2c48d",
    }
}

/// 1, 2 or 5 times a power of ten, the next one up.
fn round_step(least: f64) -> f64 {
    let power = 10_f64.powf(least.max(1e-9).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= least).unwrap_or(power)
}

impl fmt::Display for Timeline {
    /// One line a rank, one column a unit of time; a unit is the shortest action.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots = || self.ranks.iter().flatten();
        let shortest = slots().map(|s| s.end - s.start).filter(|d| *d > 0.0).fold(f64::INFINITY, f64::min);
        // No more columns than a wide screen has.
        let unit = shortest.max(self.span() / 400.0);
        let width = slots().map(|s| self.label(s).len()).max().unwrap_or(1);
        let column = |t: f64| ((t - self.first_start()) / unit).round() as usize;
        let columns = slots().map(|s| column(s.end)).max().unwrap_or(0);
        for (rank, slots) in self.ranks.iter().enumerate() {
            let mut cells = vec![String::new(); columns];
            for slot in slots {
                let (start, end) = (column(slot.start), column(slot.end).max(column(slot.start) + 1));
                for (i, cell) in cells.iter_mut().enumerate().take(end).skip(start) {
                    *cell = if i == start { self.label(slot) } else { "-".repeat(width) };
                }
            }
            write!(f, "rank {rank} |")?;
            for cell in cells {
                write!(f, "{cell:<width$}|")?;
            }
            writeln!(f)?;
        }
        writeln!(f, "{}: bubble {:.1} %", self.name, 100.0 * self.bubble_share())
    }
}

#[cfg(test)]
mod tests {
    use crate::model_parallel::pipeline::{Costs, Plan, Schedule};

    #[test]
    fn the_text_of_a_1f1b_step_can_be_read_by_eye() {
        let plan = Plan::new(Schedule::OneFOneB, 2, 1, 3).unwrap();
        let expected = "\
rank 0 |F0|F1|  |  |B0|--|F2|B1|--|  |B2|--|
rank 1 |  |F0|B0|--|F1|B1|--|F2|B2|--|  |  |
1f1b, 2 ranks, 3 micro-batches: bubble 25.0 %
";
        let drawn = plan.timeline(&Costs::default()).to_string();
        assert_eq!(drawn, expected, "\n{drawn}");
    }

    #[test]
    fn the_svg_has_a_box_for_every_action() {
        for schedule in Schedule::ALL {
            let plan = Plan::new(schedule, 3, 1, 5).unwrap();
            let actions: usize = (0..3).map(|r| plan.actions(r).len()).sum();
            let svg = plan.timeline(&Costs::default()).svg();
            assert_eq!(svg.matches("<rect x=").count(), actions);
            assert!(svg.contains("time (units of the costs)") && svg.contains(">forward</text>"), "{svg}");
        }
    }

    #[test]
    fn ticks_are_round_numbers() {
        let steps = [0.7, 1.0, 3.0, 17.0, 51.0].map(super::round_step);
        assert_eq!(steps, [1.0, 1.0, 5.0, 20.0, 100.0]);
    }
}
