//! Owns: the coverage of one lineage as a drawing: a row for each timeline, positions from left to right.
//! Does not own: the facts (`report.rs`), the colours (`page.rs`: classes of its style).
//!
//! The number of shapes is bounded: what is narrower than a pixel is drawn with its neighbours, but a gap is never
//! narrower than one can see.

use jiff::Timestamp;
use maud::{Markup, html};

use super::report::{LineageReport, TimelineReport};
use crate::continuity::GapState;
use crate::wal::{Lsn, TimelineId};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 96.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 14.0;
const ROW: f64 = 58.0;
const AXIS: f64 = 46.0;
/// Above the coverage, what can be restored; on it, backups.
const WINDOW_Y: f64 = 14.0;
const WINDOW_HEIGHT: f64 = 6.0;
const RUN_Y: f64 = 24.0;
const RUN_HEIGHT: f64 = 16.0;
const GAP_WIDTH_MIN: f64 = 4.0;
const TICKS: u64 = 5;
/// The newest timelines.
const ROWS_MAX: usize = 40;
/// Of one kind in one row.
const SHAPES_MAX: usize = 240;

/// Where positions lie on the page.
#[derive(Clone, Copy, Debug)]
struct Scale {
    from: Lsn,
    to: Lsn,
}

impl Scale {
    fn x(&self, lsn: Lsn) -> f64 {
        let span = self.to.saturating_distance(self.from).max(1) as f64;
        let part = lsn.saturating_distance(self.from) as f64 / span;
        LEFT + part.clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }
}

/// What shapes are filled with, for all drawings of a page.
pub fn patterns() -> Markup {
    html! {
        defs {
            pattern id="missing" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)" {
                rect width="6" height="6" class="gap-ground" {}
                line x1="0" y1="0" x2="0" y2="6" class="gap-line" {}
            }
        }
    }
}

/// `None` where there is nothing to draw.
pub fn coverage(lineage: &LineageReport) -> Option<Markup> {
    let positions = lineage.timelines.iter().flat_map(|timeline| &timeline.runs).flat_map(|run| [run.from, run.to]);
    let of_gaps = lineage.gaps.iter().flat_map(|gap| [gap.gap.from_lsn, gap.gap.to_lsn]);
    let all = positions.clone().chain(of_gaps);
    let scale = Scale { from: all.clone().min()?, to: all.max()? };
    positions.max()?;
    let rows: Vec<&TimelineReport> = lineage.timelines.iter().rev().take(ROWS_MAX).rev().collect();
    let height = TOP + ROW * rows.len() as f64 + AXIS;
    let row_of = |wanted: TimelineId| rows.iter().position(|row| row.timeline == wanted);
    let y_of = |row: usize| TOP + ROW * row as f64;
    Some(html! {
        svg viewBox=(format!("0 0 {WIDTH} {height}")) role="img" aria-label="Coverage of each timeline" {
            (axis(lineage, scale, height))
            @for (index, row) in rows.iter().enumerate() {
                @if let Some((parent, at)) = row.parent && let Some(above) = row_of(parent) {
                    path class="fork" d=(format!("M {0:.1} {1:.1} V {2:.1}", scale.x(at), y_of(above) + RUN_Y, y_of(index) + RUN_Y + RUN_HEIGHT)) {
                        title { "timeline " (row.timeline) " leaves timeline " (parent) " at " (at) }
                    }
                }
                (drawn_row(lineage, row, scale, y_of(index)))
            }
        }
        @if rows.len() < lineage.timelines.len() {
            p.small { "The newest " (rows.len()) " of " (lineage.timelines.len()) " timelines are drawn." }
        }
    })
}

fn drawn_row(lineage: &LineageReport, row: &TimelineReport, scale: Scale, y: f64) -> Markup {
    let runs = shapes(row.runs.iter().map(|run| (run.from, run.to)), scale);
    let windows = shapes(row.windows.iter().copied(), scale);
    let of_row = || lineage.gaps.iter().filter(|gap| gap.gap.timeline == row.timeline.0);
    let bounds = |state: GapState| {
        of_row().filter(move |gap| gap.gap.state == state).map(|gap| (gap.gap.from_lsn, gap.gap.to_lsn))
    };
    let (open, healed) = (shapes(bounds(GapState::Open), scale), shapes(bounds(GapState::Healed), scale));
    let mut backups: Vec<f64> =
        lineage.backups.iter().filter(|it| it.timeline == row.timeline).map(|it| scale.x(it.stop_lsn)).collect();
    backups.sort_by(f64::total_cmp);
    backups.dedup_by(|next, last| *next - *last < 3.0);
    html! {
        text.label x="0" y=(format!("{:.1}", y + RUN_Y + 12.0)) { "timeline " (row.timeline) }
        @for shape in &windows {
            (rectangle("window", shape, y + WINDOW_Y, WINDOW_HEIGHT, 1.5, "can be restored"))
        }
        @for shape in &runs {
            (rectangle("run", shape, y + RUN_Y, RUN_HEIGHT, 1.0, "archived"))
        }
        @for shape in &healed {
            (rectangle("healed", shape, y + RUN_Y, RUN_HEIGHT, GAP_WIDTH_MIN, "gap, healed"))
        }
        @for shape in &open {
            (rectangle("gap", shape, y + RUN_Y - 3.0, RUN_HEIGHT + 6.0, GAP_WIDTH_MIN, "gap"))
        }
        @for x in &backups {
            path.backup d=(format!("M {x:.1} {0:.1} l 5 8 h -10 z", y + RUN_Y + RUN_HEIGHT + 2.0)) { title { "backup" } }
        }
    }
}

/// What is drawn as one: from where to where on the page, and the positions that stand for it.
#[derive(Debug, PartialEq)]
struct Shape {
    x: f64,
    end: f64,
    from: Lsn,
    to: Lsn,
    count: usize,
}

/// In order; neighbours that would touch on the page are one, and so are the nearest where there are too many.
fn shapes(ranges: impl Iterator<Item = (Lsn, Lsn)>, scale: Scale) -> Vec<Shape> {
    let mut sorted: Vec<(Lsn, Lsn)> = ranges.collect();
    sorted.sort();
    let mut distance = if sorted.len() > 1 { 0.5 } else { 0.0 };
    loop {
        let mut shapes: Vec<Shape> = Vec::new();
        for &(from, to) in &sorted {
            let (x, end) = (scale.x(from), scale.x(to));
            match shapes.last_mut() {
                Some(last) if x - last.end < distance => {
                    (last.end, last.to) = (end.max(last.end), to.max(last.to));
                    last.count += 1;
                }
                _ => shapes.push(Shape { x, end, from, to, count: 1 }),
            }
        }
        if shapes.len() <= SHAPES_MAX {
            return shapes;
        }
        distance *= 2.0;
    }
}

fn rectangle(class: &str, shape: &Shape, y: f64, height: f64, width_min: f64, what: &str) -> Markup {
    let width = (shape.end - shape.x).max(width_min);
    let x = shape.x.min(WIDTH - RIGHT - width);
    html! {
        rect class=(class) x=(format!("{x:.1}")) y=(format!("{y:.1}")) width=(format!("{width:.1}"))
            height=(format!("{height:.1}")) rx="1.5" {
            title {
                (what) ": " (shape.from) " to " (shape.to)
                @if shape.count > 1 { " (" (shape.count) " parts)" }
            }
        }
    }
}

fn axis(lineage: &LineageReport, scale: Scale, height: f64) -> Markup {
    let span = scale.to.saturating_distance(scale.from);
    let tick = |n: u64| Lsn(scale.from.0 + (u128::from(span) * u128::from(n) / u128::from(TICKS - 1)) as u64);
    let bottom = height - AXIS;
    html! {
        @for n in 0..TICKS {
            @let lsn = tick(n);
            @let x = scale.x(lsn);
            @let anchor = if n == 0 { "start" } else if n == TICKS - 1 { "end" } else { "middle" };
            line.tick x1=(format!("{x:.1}")) x2=(format!("{x:.1}")) y1=(TOP) y2=(format!("{:.1}", bottom + 4.0)) {}
            text.axis x=(format!("{x:.1}")) y=(format!("{:.1}", bottom + 17.0)) text-anchor=(anchor) { (lsn) }
            @if let Some(time) = before(&lineage.times, lsn) {
                text.axis x=(format!("{x:.1}")) y=(format!("{:.1}", bottom + 31.0)) text-anchor=(anchor) {
                    (time.strftime("%Y-%m-%d %H:%MZ"))
                }
            }
        }
    }
}

fn before(times: &[(Lsn, Timestamp)], lsn: Lsn) -> Option<Timestamp> {
    times.iter().take_while(|(at, _)| *at <= lsn).last().map(|(_, time)| *time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shapes_are_few_and_cover_every_range(ranges in prop::collection::vec((0u64..1 << 40, 0u64..1 << 30), 0..2000)) {
            let scale = Scale { from: Lsn(0), to: Lsn(1 << 40) };
            let ranges: Vec<(Lsn, Lsn)> = ranges.into_iter().map(|(from, len)| (Lsn(from), Lsn(from + len))).collect();
            let drawn = shapes(ranges.iter().copied(), scale);
            prop_assert!(drawn.len() <= SHAPES_MAX);
            prop_assert_eq!(drawn.iter().map(|shape| shape.count).sum::<usize>(), ranges.len());
            for (from, to) in ranges {
                prop_assert!(drawn.iter().any(|shape| shape.from <= from && to <= shape.to));
            }
            prop_assert!(drawn.windows(2).all(|pair| pair[0].x <= pair[1].x));
        }
    }
}
