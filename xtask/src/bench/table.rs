//! Rows of figures, minimum and median of several runs.

use std::collections::BTreeMap;

/// Figures by row, in the order in which rows first came.
#[derive(Default)]
pub struct Table {
    order: Vec<&'static str>,
    rows: BTreeMap<&'static str, Row>,
}

#[derive(Default)]
struct Row {
    limit: &'static str,
    unit: &'static str,
    figures: Vec<f64>,
}

impl Table {
    /// Adds one figure. `limit` is what it shall be, e.g. `≤ 1.15`, or empty.
    pub fn add(&mut self, row: &'static str, limit: &'static str, unit: &'static str, figure: f64) {
        eprintln!("  {row}: {figure:.2}{unit}");
        let entry = self.rows.entry(row).or_insert_with(|| {
            self.order.push(row);
            Row { limit, unit, figures: vec![] }
        });
        entry.figures.push(figure);
    }

    /// The table as Markdown.
    pub fn markdown(&self) -> String {
        let mut text = String::from("| what | minimum | median | limit |\n| --- | --- | --- | --- |\n");
        for name in &self.order {
            let Row { limit, unit, figures } = &self.rows[name];
            let mut sorted = figures.clone();
            sorted.sort_by(f64::total_cmp);
            let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
            text += &format!("| {name} | {:.2}{unit} | {median:.2}{unit} | {limit} |\n", sorted[0]);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_minimum_and_median_in_the_order_of_the_rows() {
        let mut table = Table::default();
        table.add("z", "≤ 1", "", 3.0);
        table.add("a", "", " s", 1.0);
        table.add("z", "≤ 1", "", 1.0);
        table.add("z", "≤ 1", "", 2.5);
        table.add("a", "", " s", 2.0);
        let rows: Vec<String> = table.markdown().lines().skip(2).map(String::from).collect();
        assert_eq!(rows, ["| z | 1.00 | 2.50 | ≤ 1 |", "| a | 1.00 s | 1.50 s |  |"]);
    }
}
