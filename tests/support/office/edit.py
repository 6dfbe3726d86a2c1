"""Fills in a workbook like a reviewer using LibreOffice; run by the system's Python, which has LibreOffice's UNO.

    python3 edit.py PIPE WORKBOOK EDITS.json FOLDER

PIPE names the pipe on which a headless soffice listens. EDITS.json maps row ids to {column: what is typed}. The
sheet is filled in, sorted by row id from last to first, and saved to FOLDER as reviewed.xlsx, reviewed-Cases.csv and
reviewed.pdf.
"""

import json
import sys
import time
from pathlib import Path

import uno
from com.sun.star.beans import PropertyValue
from com.sun.star.connection import NoConnectException
from com.sun.star.table import TableSortField

HEADER = 2  # counted from 0; a banner and the captions are above
SECONDS = 60


def main():
    pipe, workbook, edits, folder = sys.argv[1:]
    desktop = connect(pipe)
    document = desktop.loadComponentFromURL(Path(workbook).resolve().as_uri(), "_blank", 0, properties(Hidden=True))
    sheet = document.Sheets.getByName("Cases")
    fill(sheet, json.loads(Path(edits).read_text()))
    sort(sheet)
    save(document, Path(folder) / "reviewed.pdf", "calc_pdf_Export")
    save(document, Path(folder) / "reviewed.xlsx", "Calc MS Excel 2007 XML")
    # Semicolons, quotes, UTF-8, cells as shown, and the second sheet, whose name LibreOffice adds to the file's name.
    options = "59,34,76,1,,0,false,true,false,false,false,2"
    save(document, Path(folder) / "reviewed.csv", "Text - txt - csv (StarCalc)", options)
    document.close(True)
    desktop.terminate()


def connect(pipe):
    resolver = uno.getComponentContext().ServiceManager.createInstance("com.sun.star.bridge.UnoUrlResolver")
    for _ in range(SECONDS * 4):
        try:
            context = resolver.resolve(f"uno:pipe,name={pipe};urp;StarOffice.ComponentContext")
            return context.ServiceManager.createInstanceWithContext("com.sun.star.frame.Desktop", context)
        except NoConnectException:
            time.sleep(0.25)
    raise SystemExit("soffice does not answer")


def used(sheet):
    cursor = sheet.createCursor()
    cursor.gotoEndOfUsedArea(False)
    return cursor.RangeAddress.EndColumn, cursor.RangeAddress.EndRow


def fill(sheet, edits):
    last_column, last_row = used(sheet)
    columns = {sheet.getCellByPosition(at, HEADER).String: at for at in range(last_column + 1)}
    for row in range(HEADER + 1, last_row + 1):
        for name, typed in edits.get(sheet.getCellByPosition(0, row).String, {}).items():
            cell = sheet.getCellByPosition(columns[name], row)
            if isinstance(typed, str) and ("\n" in typed or typed.startswith("=")):
                cell.String = typed
            else:
                cell.FormulaLocal = str(typed)  # as if typed: 4 becomes a number, 2026-01-31 a date


def sort(sheet):
    last_column, last_row = used(sheet)
    field = TableSortField()
    field.Field, field.IsAscending = 0, False
    cells = sheet.getCellRangeByPosition(0, HEADER, last_column, last_row)
    fields = uno.Any("[]com.sun.star.table.TableSortField", (field,))
    cells.sort(properties(SortFields=fields, ContainsHeader=True))


def save(document, path, form, options=""):
    document.storeToURL(path.resolve().as_uri(), properties(FilterName=form, FilterOptions=options))


def properties(**values):
    return tuple(PropertyValue(Name=name, Value=value) for name, value in values.items())


main()
