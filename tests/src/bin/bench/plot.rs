//! Plots as SVG.
//!
//! In: series of points. Out: the text of a picture. Nothing is read or written.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

const SIZE: (u32, u32) = (860, 480);
const FONT: &str = "sans-serif";
/// omirr's first; told apart by those who see no red or green, too.
const COLOURS: [RGBColor; 10] = [
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x55, 0x55, 0x55),
    RGBColor(0xb3, 0xa6, 0x00),
    RGBColor(0x80, 0x40, 0x20),
    RGBColor(0x60, 0x30, 0xa0),
];

/// One tool's points.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// What is on the two axes.
#[derive(Clone, Copy, Debug)]
pub struct Axes {
    pub title: &'static str,
    pub x: &'static str,
    pub y: &'static str,
}

/// Both axes in powers of ten. None without points.
///
/// # Errors
/// The library fails.
pub fn powers(axes: Axes, series: &[Series]) -> Result<Option<String>> {
    let Some((x, y)) = ranges(series) else {
        return Ok(None);
    };
    let mut text = String::new();
    {
        let area = area(&mut text)?;
        let mut chart = builder(&area, axes)
            .build_cartesian_2d((x.0..x.1).log_scale(), (y.0..y.1).log_scale())
            .map_err(failed)?;
        chart
            .configure_mesh()
            .x_desc(axes.x)
            .y_desc(axes.y)
            .light_line_style(TRANSPARENT)
            .x_label_formatter(&|value| short(*value))
            .y_label_formatter(&|value| short(*value))
            .label_style((FONT, 14))
            .draw()
            .map_err(failed)?;
        for (series, colour) in series.iter().zip(COLOURS.iter().cycle()) {
            let style = colour.stroke_width(2);
            chart
                .draw_series(LineSeries::new(series.points.iter().copied(), style))
                .map_err(failed)?
                .label(&series.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
            chart
                .draw_series(
                    series
                        .points
                        .iter()
                        .map(|&point| Circle::new(point, 3, colour.filled())),
                )
                .map_err(failed)?;
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)?;
        area.present().map_err(failed)?;
    }
    Ok(Some(text))
}

/// How much of a hundred is not above a value; values in powers of ten. The
/// points' second numbers are ignored. None without points.
///
/// # Errors
/// The library fails.
pub fn distribution(axes: Axes, series: &[Series]) -> Result<Option<String>> {
    let Some((x, _)) = ranges(series) else {
        return Ok(None);
    };
    let mut text = String::new();
    {
        let area = area(&mut text)?;
        let mut chart = builder(&area, axes)
            .build_cartesian_2d((x.0..x.1).log_scale(), 0.0..100.0)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .x_desc(axes.x)
            .y_desc(axes.y)
            .light_line_style(TRANSPARENT)
            .x_label_formatter(&|value| short(*value))
            .label_style((FONT, 14))
            .draw()
            .map_err(failed)?;
        for (series, colour) in series.iter().zip(COLOURS.iter().cycle()) {
            let style = colour.stroke_width(2);
            chart
                .draw_series(LineSeries::new(steps(&series.points), style))
                .map_err(failed)?
                .label(&series.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        legend(&mut chart, SeriesLabelPosition::LowerRight)?;
        area.present().map_err(failed)?;
    }
    Ok(Some(text))
}

type Area<'text> = DrawingArea<SVGBackend<'text>, Shift>;

fn area(text: &mut String) -> Result<Area<'_>> {
    let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(failed)?;
    Ok(area)
}

fn builder<'area, 'text>(
    area: &'area Area<'text>,
    axes: Axes,
) -> ChartBuilder<'area, 'text, SVGBackend<'text>> {
    let mut builder = ChartBuilder::on(area);
    builder
        .caption(axes.title, (FONT, 20))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(70);
    builder
}

fn legend<'area, 'text: 'area, C: CoordTranslate>(
    chart: &mut ChartContext<'area, SVGBackend<'text>, C>,
    position: SeriesLabelPosition,
) -> Result<()> {
    chart
        .configure_series_labels()
        .position(position)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 14))
        .draw()
        .map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("a plot cannot be drawn: {error}")
}

/// A little wider than the points, which are above zero.
fn ranges(series: &[Series]) -> Option<((f64, f64), (f64, f64))> {
    let all: Vec<(f64, f64)> = series
        .iter()
        .flat_map(|series| series.points.iter().copied())
        .collect();
    let range = |values: &mut dyn Iterator<Item = f64>| {
        let (least, most) = values
            .filter(|value| *value > 0.0)
            .fold((f64::MAX, 0.0_f64), |(least, most), value| {
                (least.min(value), most.max(value))
            });
        (most > 0.0).then_some((least * 0.7, most * 1.4))
    };
    Some((
        range(&mut all.iter().map(|point| point.0))?,
        range(&mut all.iter().map(|point| point.1))?,
    ))
}

/// Up by one point's share at each point.
fn steps(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut values: Vec<f64> = points.iter().map(|point| point.0).collect();
    values.sort_by(f64::total_cmp);
    let share = 100.0 / values.len().max(1) as f64;
    values
        .iter()
        .enumerate()
        .flat_map(|(nth, &value)| [(value, nth as f64 * share), (value, (nth + 1) as f64 * share)])
        .collect()
}

/// `1000000` as `1M`.
fn short(value: f64) -> String {
    for (size, name) in [(1e9, "G"), (1e6, "M"), (1e3, "k")] {
        if value >= size {
            return format!("{}{name}", trimmed(value / size));
        }
    }
    trimmed(value)
}

fn trimmed(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_rises_to_a_hundred() {
        let steps = steps(&[(3.0, 0.0), (1.0, 0.0)]);
        assert_eq!(steps, [(1.0, 0.0), (1.0, 50.0), (3.0, 50.0), (3.0, 100.0)]);
    }

    #[test]
    fn numbers_on_axes_are_short() {
        let written: Vec<String> = [0.01, 1.0, 1500.0, 1e6].into_iter().map(short).collect();
        assert_eq!(written, ["0.01", "1", "1.5k", "1M"]);
    }

    #[test]
    fn a_plot_names_its_series_and_there_is_none_without_points() {
        let axes = Axes {
            title: "t",
            x: "files",
            y: "s",
        };
        let series = [Series {
            name: "omirr".to_owned(),
            points: vec![(10.0, 1.0), (100.0, 2.0)],
        }];
        for plot in [powers, distribution] {
            let text = plot(axes, &series).unwrap().unwrap();
            assert!(text.starts_with("<svg") && text.contains("omirr"));
            assert!(plot(axes, &[]).unwrap().is_none());
        }
    }
}
