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

    /// The picture as SVG: one row a rank, forwards blue, backwards green, gradients of weights orange.
    pub fn svg(&self) -> String {
        const WIDTH: f64 = 1200.0;
        const LEFT: f64 = 60.0;
        const ROW: f64 = 34.0;
        let (zero, span) = (self.first_start(), self.span().max(f64::MIN_POSITIVE));
        let height = ROW * (self.ranks.len() as f64 + 1.0) + 14.0;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {height}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<text x=\"4\" y=\"20\">{}: bubble {:.1} %</text>\n",
            WIDTH + LEFT + 10.0,
            self.name,
            100.0 * self.bubble_share()
        );
        for (rank, slots) in self.ranks.iter().enumerate() {
            let y = ROW * (rank as f64 + 1.0);
            let _ = writeln!(svg, "<text x=\"4\" y=\"{}\">rank {rank}</text>", y + 18.0);
            for slot in slots {
                let x = LEFT + (slot.start - zero) / span * WIDTH;
                let width = (slot.end - slot.start) / span * WIDTH;
                let colour = match slot.action.pass {
                    Pass::Forward => "#8fb8de",
                    Pass::Backward | Pass::BackwardInput => "#9fd3a4",
                    Pass::BackwardWeight => "#f2c48d",
                };
                let label = self.label(slot);
                let _ = write!(
                    svg,
                    "<rect x=\"{x:.2}\" y=\"{y}\" width=\"{width:.2}\" height=\"28\" fill=\"{colour}\" \
                     stroke=\"#444\"><title>{}</title></rect>",
                    slot.action
                );
                if width > 8.0 * label.len() as f64 {
                    let _ = write!(svg, "<text x=\"{:.2}\" y=\"{}\">{label}</text>", x + 3.0, y + 18.0);
                }
                svg.push('\n');
            }
        }
        svg.push_str("</svg>\n");
        svg
    }
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
            assert_eq!(plan.timeline(&Costs::default()).svg().matches("<rect").count(), actions);
        }
    }
}
